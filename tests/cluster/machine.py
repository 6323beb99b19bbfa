"""The machine under the hosts: its commands, its processes and its memory groups."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATHS = "/usr/sbin:/sbin:/usr/bin:/bin"


def command(*words: str, **options: Any) -> str:
    """Runs a command that must succeed; its output."""
    env = {**os.environ, "PATH": f"{os.environ['PATH']}:{PATHS}"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False, **options)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def wait_until(condition: Callable[[], Any], timeout: float = 10.0, what: str = "it") -> None:
    """Returns when the condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come about within {timeout:g} s"
        time.sleep(0.02)


def join(group: Path) -> None:
    """Puts the calling process into a cgroup."""
    (group / "cgroup.procs").write_text("0")


def memory_group() -> Path:
    """The memory cgroup of this process, below which one may be made."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            below = Path("/sys/fs/cgroup/memory", path.lstrip("/"))
            return below if below.is_dir() else Path("/sys/fs/cgroup/memory")
    return Path("/sys/fs/cgroup")


def parent_of(pid: int) -> int:
    """0: it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def command_line(pid: int) -> str:
    """The words a process was started with; empty: it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def environment_of(pid: int) -> str:
    """The environment a process was started with; empty: it is gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().replace(b"\0", b"\n").decode(errors="replace")
    except OSError:
        return ""
