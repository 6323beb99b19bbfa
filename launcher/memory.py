"""What the kernel tells of this process's memory: kills for lack of it, and how much there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

CGROUPS: Final = Path("/sys/fs/cgroup")
OWN: Final = Path("/proc/self/cgroup")


def oom_kills() -> int:
    """Processes of this process's cgroup that the kernel has killed for memory; 0 where it does not tell."""
    for path in _event_files():
        try:
            told = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        if told:
            return int(told[1])
    return 0


def total_bytes() -> int:
    """Memory of this machine, or of its cgroup where that is less."""
    told = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    machine = int(told[1]) * 1024 if told else 0
    return min([machine, *_limits()])


def available_bytes() -> int:
    """Memory that could be had now."""
    told = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(told[1]) * 1024 if told else 0


def _event_files() -> list[Path]:
    return [folder / name for folder in _folders() for name in ("memory.events", "memory.oom_control")]


def _limits() -> list[int]:
    paths = [folder / name for folder in _folders() for name in ("memory.max", "memory.limit_in_bytes")]
    return [int(text) for path in paths if (text := _text(path)).isdigit()]


def _folders() -> list[Path]:
    """This process's own memory cgroup first (v1 and v2), then what a container sees as its own."""
    folders = []
    for line in _text(OWN).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            mount = CGROUPS / "memory" if controllers else CGROUPS
            folders += [mount / path.lstrip("/"), mount]
    return folders


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
