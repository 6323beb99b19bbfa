"""podman for a test, where no container engine runs: namespaces and settings of its own, images from Debian's packages.

The containers' networks are in a network namespace of the test's; nothing reaches or leaves the machine's own, but for
``build``, whose apt-get and pip use the machine's network.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

NEEDED = ("podman", "crun", "netavark", "aardvark-dns", "catatonit", "debootstrap", "iptables")
NEEDED += ("unshare", "nsenter", "ip")
PLACES = f"{os.environ['PATH']}:/usr/sbin:/sbin:/usr/libexec/podman:/usr/lib/podman"
DEBIAN = "localhost/debian:bookworm-slim"
INCLUDED = "ca-certificates,libgomp1,openssh-client,openssh-server,python3,python3-venv"
HOLD = """
if [ "$(stat -fc %T /sys/fs/cgroup)" != cgroup2fs ] && mountpoint -q /sys/fs/cgroup/unified
then umount /sys/fs/cgroup/unified
fi
ip link set lo up && touch "$1" && exec sleep infinity
"""
"""crun refuses a second cgroup hierarchy that has controllers beside the first: it is hidden in here only."""


def missing() -> list[str]:
    """What this machine lacks."""
    lacking = [name for name in NEEDED if shutil.which(name, path=PLACES) is None]
    return lacking + ([] if os.geteuid() == 0 else ["root"])


class Pods:
    """A podman of the test's own, for as long as the ``with`` block lasts; images stay in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._holder: subprocess.Popen[bytes] | None = None
        self.environment = {
            **os.environ,
            "PATH": PLACES,
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }

    def __enter__(self) -> Self:
        lacking = missing()
        assert not lacking, f"these tests need {', '.join(lacking)}; see make test-containers"
        self._write_settings()
        ready = self.folder / "ready"
        ready.unlink(missing_ok=True)
        words = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-ec", HOLD, "sh", str(ready)]
        self._holder = subprocess.Popen(words, env=self.environment, start_new_session=True)
        deadline = time.monotonic() + 10
        while not ready.exists():
            assert time.monotonic() < deadline, "the containers' namespaces did not come up"
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        if self._holder is not None:
            self.run("podman", "rm", "--all", "--force", "--time", "0")
            self.run("podman", "network", "prune", "--force")
            self._holder.send_signal(signal.SIGKILL)
            self._holder.wait()
        for group in sorted(Path("/sys/fs/cgroup").glob("*/libpod_parent/**/"), reverse=True):
            group.rmdir()

    def run(self, *words: str, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command beside the containers."""
        return self._enter(("--net", "--mount"), words, timeout, **options)

    def build(self, *words: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """``podman build`` with the machine's network."""
        more = ("podman", "build", "--pull=never", "--network=host", *words)
        return self._enter(("--mount",), more, timeout)

    def make_debian(self, cached: Path) -> None:
        """A base image from Debian's own packages, in the place of the published one."""
        if self.run("podman", "image", "exists", DEBIAN).returncode == 0:
            return
        if not cached.exists():
            _debootstrap(cached)
        done = self.run("podman", "import", "--quiet", str(cached), DEBIAN)
        assert done.returncode == 0, done.stderr

    def _enter(
        self, namespaces: Sequence[str], words: Sequence[str], timeout: float, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        assert self._holder is not None
        cwd = options.pop("cwd", Path.cwd())
        entry = ["nsenter", "--target", str(self._holder.pid), *namespaces, f"--wd={cwd}", "--"]
        options = {"env": self.environment, **options}
        return subprocess.run([*entry, *words], capture_output=True, text=True, timeout=timeout, check=False, **options)

    def _write_settings(self) -> None:
        (self.folder / "networks").mkdir(parents=True, exist_ok=True)
        hard = subprocess.run(["bash", "-c", "ulimit -Hn"], capture_output=True, text=True, check=True).stdout.strip()
        (self.folder / "containers.conf").write_text(
            f'[containers]\ndefault_ulimits = ["nofile=1024:{hard}", "nproc=20000:20000"]\n'
            '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
            f'[network]\nnetwork_config_dir = "{self.folder}/networks"\n'
        )
        (self.folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\nrunroot = "{self.folder}/run"\ngraphroot = "{self.folder}/graph"\n'
        )


def _debootstrap(tar: Path) -> None:
    tree = tar.with_suffix(".tree")
    shutil.rmtree(tree, ignore_errors=True)
    tar.parent.mkdir(parents=True, exist_ok=True)
    words = ["debootstrap", "--variant=minbase", f"--include={INCLUDED}", "bookworm", str(tree)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, "PATH": PLACES})
    assert done.returncode == 0, done.stdout[-2000:]
    partial = tar.with_suffix(".partial")
    with tarfile.open(partial, "w") as file:
        file.add(tree, arcname=".")
    partial.rename(tar)
    shutil.rmtree(tree)
