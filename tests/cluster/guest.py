"""A machine with several NUMA nodes: a QEMU guest (emulated, so neither KVM nor root is needed) that runs this Python.

Its whole disk is an initramfs: the interpreter with its standard library, and this project. Needs Debian's
qemu-system-x86 and linux-image-cloud-amd64.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
QEMU = "qemu-system-x86_64"
LEFT_OUT = ("test", "site-packages", "idlelib", "tkinter", "ensurepip", "lib2to3", "turtledemo", "config-*")
BOOT_S = 540.0
MARK = "guest> "


@dataclass(frozen=True)
class Machine:
    """What the guest is made of."""

    sockets: int
    numa_nodes: Sequence[Sequence[int]]
    """Cpus of each NUMA node; none: memory only."""
    mib: int = 320
    """Memory of each NUMA node that has cpus."""
    mib_without_cpus: int = 128

    def words(self) -> list[str]:
        """QEMU's arguments."""
        cpus = sum(len(node) for node in self.numa_nodes)
        sizes = [self.mib if node else self.mib_without_cpus for node in self.numa_nodes]
        words = [
            "-m",
            f"{sum(sizes)}M",
            "-smp",
            f"{cpus},sockets={self.sockets},cores={cpus // self.sockets},threads=1",
        ]
        for number, (node, size) in enumerate(zip(self.numa_nodes, sizes, strict=True)):
            words += ["-object", f"memory-backend-ram,id=m{number},size={size}M"]
            held = "".join(f",cpus={cpu}" for cpu in node)
            words += ["-numa", f"node,nodeid={number},memdev=m{number}{held}"]
        return words


def missing() -> list[str]:
    """What this machine lacks for guests."""
    return [*([] if shutil.which(QEMU) else [QEMU]), *([] if _kernels() else ["/boot/vmlinuz-*-cloud-amd64"])]


def run(
    machine: Machine, commands: Sequence[Sequence[str]], files: dict[str, str], folder: Path
) -> list[dict[str, Any]]:
    """Boots the machine, runs the commands one after the other, and returns {"code", "out", "err"} of each."""
    image = folder / "initramfs.gz"
    with gzip.open(image, "wb", compresslevel=1) as disk:
        _write_disk(disk, {**files, "/commands.json": json.dumps(commands)})
    words = [QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-display", "none", "-nic", "none", "-no-reboot"]
    words += ["-kernel", str(_kernels()[-1]), "-initrd", str(image), "-serial", "stdio", *machine.words()]
    done = subprocess.run(
        [*words, "-append", "console=ttyS0 quiet panic=-1"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=BOOT_S,
        check=False,
    )
    told = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert len(told) == len(commands), f"{done.stdout[-4000:]}{done.stderr[-1000:]}"
    return told


def _kernels() -> list[Path]:
    return sorted(Path("/boot").glob("vmlinuz-*-cloud-amd64"))


def _write_disk(disk: IO[bytes], files: dict[str, str]) -> None:
    """A cpio archive in the "newc" format (Linux: Documentation/driver-api/early-userspace/buffer-format.rst)."""
    init = f"#!{_interpreter()} -I\n" + Path(__file__).with_name("guest_init.py").read_text()
    texts = {"/init": init, **files}
    paths = sorted(set(_paths()))
    folders = {str(parent) for path in [*paths, *map(Path, texts)] for parent in path.parents}
    for name in sorted(folders - {"/"}):
        _entry(disk, name, stat.S_IFDIR | 0o755, b"")
    for path in paths:
        _entry(disk, str(path), stat.S_IFREG | 0o755, _source(path).read_bytes())
    for name, text in texts.items():
        _entry(disk, name, stat.S_IFREG | 0o755, text.encode())
    _entry(disk, "TRAILER!!!", 0, b"")


def _entry(disk: IO[bytes], name: str, mode: int, data: bytes) -> None:
    named = name.lstrip("/").encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(named), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + named
    disk.write(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))


def _interpreter() -> Path:
    return Path(sys.executable).resolve()


def _paths() -> Iterator[Path]:
    """Where the guest has its files; most are where this machine has them."""
    yield _interpreter()
    library = Path(sysconfig.get_path("stdlib")).resolve()
    for path in library.rglob("*"):
        inside = path.relative_to(library)
        if path.is_file() and not any(Path(inside.parts[0]).match(name) for name in LEFT_OUT):
            yield path
    yield from _shared_libraries([_interpreter(), *library.glob("lib-dynload/*.so")])
    for package in ("launcher", "falcon_dist"):
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".toml"):
                yield Path("/project") / path.relative_to(ROOT)


def _source(path: Path) -> Path:
    return ROOT / path.relative_to("/project") if path.is_relative_to("/project") else path


def _shared_libraries(binaries: Sequence[Path]) -> Iterator[Path]:
    listed = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, env=os.environ, check=False)
    for found in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", listed.stdout, re.MULTILINE):
        yield Path(found)
