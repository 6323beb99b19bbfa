"""Where a rank stands: the stacks it wrote when asked, and what the kernel says of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from falcon_dist.contract import STACKS_FILE
from launcher.standing import LOCKED

MOST_BYTES: Final = 1 << 16
CRASHED: Final = "Fatal Python error: "
"""faulthandler's first words."""
CRASH_LINES: Final = 15
LOCKED_HZ: Final = 50
"""A thread of CPython that wants the interpreter's lock asks for it 200 times a second (sys.getswitchinterval); one
that waits for its peers sleeps until they have come."""


def standing(pid: int, folder: Path, waits_hz: float) -> dict[str, str]:
    """The kernel's letter for the process's state, or LOCKED, and its stacks; empty texts where there are none.

    ``waits_hz``: how often a second its main thread began to wait, of late.
    """
    state = _state(pid)
    return {
        "state": LOCKED if state == "S" and waits_hz > LOCKED_HZ else state,
        "stacks": _stacks(folder / STACKS_FILE),
    }


def is_held(pid: int) -> bool:
    """Whether the kernel holds the process in something that nothing can interrupt: the wait for a disk, mostly."""
    return _state(pid) == "D"


def waits(pid: int) -> int:
    """How often the process's main thread has begun to wait; 0: it is gone."""
    try:
        lines = Path(f"/proc/{pid}/task/{pid}/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("voluntary_ctxt_switches")))
    except (OSError, StopIteration):
        return 0


def crash(stderr: Path) -> list[str]:
    """What faulthandler wrote when the process crashed: the fault and the stack it came in; empty: no such words.

    Nor are there any where the run folder is gone.
    """
    try:
        with stderr.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MOST_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    starts = [number for number, line in enumerate(lines) if line.startswith(CRASHED)]
    return lines[starts[-1] :][:CRASH_LINES] if starts else []


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _stacks(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""
