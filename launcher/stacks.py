"""Where a rank stands: the stacks it wrote when asked, and what the kernel says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from falcon_dist.contract import STACKS_FILE

MOST_BYTES: Final = 1 << 16
CRASHED: Final = "Fatal Python error: "
"""faulthandler's first words."""
CRASH_LINES: Final = 15


def standing(pid: int, folder: Path) -> dict[str, str]:
    """The kernel's letter for the process's state, and its stacks; empty texts where there are none."""
    return {"state": _state(pid), "stacks": _stacks(folder / STACKS_FILE)}


def crash(stderr: Path) -> list[str]:
    """What faulthandler wrote when the process crashed: the fault and the stack it came in; empty: no such words."""
    with stderr.open("rb") as file:
        file.seek(max(0, stderr.stat().st_size - MOST_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
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
