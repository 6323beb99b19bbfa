"""What an agent tells of its host at once, cheaply: every --dry-run waits for it."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from launcher import sysfs

VERSIONS_OF: Final = (
    *("falcon-dist", "torch", "transformers", "trl", "accelerate"),
    *("oneccl-cpu-devel", "oneccl-bind-pt", "intel-extension-for-pytorch"),
)
PROTOCOL: Final = 4
IDENTITY: Final = ("HOME", "USER", "LOGNAME", "SHELL")
"""Variables that are the host's own business."""
ALLOCATORS: Final = {
    "tcmalloc": ("libtcmalloc.so", "libtcmalloc_minimal.so"),
    "jemalloc": ("libjemalloc.so",),
}
INFINIBAND: Final = Path("/sys/class/infiniband")
PROVIDERS: Final = (("hfi1", "psm3"), ("efa", "efa"), ("rdmap", "efa"))
"""How a device's name begins and libfabric's provider for it; any other device is taken by verbs."""
SONAME_ENDS: Final = ("", ".4", ".2", ".1")


def facts() -> dict[str, Any]:
    """The agent's first words."""
    return {
        "protocol": PROTOCOL,
        "hostname": socket.gethostname(),
        "boot_id": _boot_id(),
        "pid": os.getpid(),
        "python": sys.executable,
        "python_version": sys.version.split()[0],
        "versions": versions(),
        "identity": {name: os.environ[name] for name in IDENTITY if name in os.environ},
        "allocators": allocators(),
        "compiler": compiler(os.environ),
        "fabric": fabric(),
        "topology": sysfs.read().to_json(),
    }


def versions() -> dict[str, str]:
    """Installed distributions that matter to a run."""
    # importlib.metadata would tell the same in ten times the time.
    entries = [p.name for place in reversed(sys.path) if place for p in Path(place).glob("*.dist-info")]
    parts = [name.removesuffix(".dist-info").rpartition("-") for name in entries]
    installed = {name.lower().replace("_", "-"): version for name, _, version in parts}
    return {name: installed[name] for name in VERSIONS_OF if name in installed}


def compiler(environ: Mapping[str, str]) -> str:
    """Path of the C++ compiler that the ccl backend would be built with; empty where there is none."""
    name = environ.get("CXX") or "g++"
    found = (Path(place, name) for place in environ.get("PATH", "").split(os.pathsep) if place)
    return next((str(path) for path in found if path.is_file()), "")


def allocators() -> dict[str, str]:
    """Memory allocators found beside the interpreter, or where Debian and others put libraries."""
    machine = f"{os.uname().machine}-linux-gnu"
    places = [Path(sys.prefix, "lib")]
    places += [Path(p) for p in (f"/usr/lib/{machine}", f"/lib/{machine}", "/usr/lib64", "/usr/local/lib", "/usr/lib")]
    found: dict[str, str] = {}
    for name, libraries in ALLOCATORS.items():
        paths = (p / f"{lib}{end}" for p in places for lib in libraries for end in SONAME_ENDS)
        if path := next((p for p in paths if p.is_file()), None):
            found[name] = str(path)
    return found


def fabric(devices: Path = INFINIBAND) -> str:
    """libfabric's provider for this host's first RDMA device, "tcp" where it has none (fabric(7), fi_provider(7))."""
    try:
        first = min(entry.name for entry in devices.iterdir())
    except (OSError, ValueError):
        return "tcp"
    return next((provider for name, provider in PROVIDERS if first.startswith(name)), "verbs")


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
