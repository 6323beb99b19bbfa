"""How much memory this host, or the cgroup this process lives in, has in all, and has left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

CGROUPS: Final = Path("/sys/fs/cgroup")
OWN: Final = Path("/proc/self/cgroup")
LIMITS: Final = ("memory.max", "memory.limit_in_bytes")
"""The file that holds a limit in version 2 and in version 1."""


def room_bytes(ranks: int) -> int:
    """What ``ranks`` processes like this one could still take together."""
    used: int = ranks * psutil.Process().memory_info().rss
    return min(int(psutil.virtual_memory().available), total_bytes() - used)


def total_bytes() -> int:
    """The machine's memory, or the least limit of this process's cgroup and those around it."""
    return min([int(psutil.virtual_memory().total), *_limits()])


def _limits() -> Iterator[int]:
    for folder in _folders():
        for name in LIMITS:
            try:
                text = (folder / name).read_text().strip()
            except OSError:
                continue
            if text.isdigit():
                yield int(text)


def _folders() -> Iterator[Path]:
    """Of each hierarchy that counts memory: this process's group, all around it, and the root as a container has it."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = CGROUPS / "memory" if controllers else CGROUPS
        own = mount / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(mount))
