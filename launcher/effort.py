"""How much processor time processes have used: what a process that waits for ever does not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

TICKS_HZ: Final = os.sysconf("SC_CLK_TCK")


def used_s(pids: Iterable[int]) -> float:
    """Seconds used by these processes, their living descendants and the ended ones that any of them waited for."""
    return sum(_own_s(pid) + used_s(_children(pid)) for pid in pids)


def _own_s(pid: int) -> float:
    """utime, stime, cutime and cstime of proc(5)."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, values[11:15])) / TICKS_HZ


def _children(pid: int) -> list[int]:
    """Of each of its threads; none where the kernel does not tell."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # this thread has ended
            found += map(int, file.read_text().split())
    return found
