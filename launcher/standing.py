"""Who keeps the others waiting, as told by where every rank stands when no step comes any more. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from launcher.events import Traced

WAITING: Final = re.compile(r"_engine_run_backward|distributed_c10d|all_reduce|all_gather|broadcast|barrier|\bwait\b")
"""Frames in which a rank waits for its peers: DDP's all-reduce runs inside the backward pass."""
NEAR: Final = 4
"""Frames nearest to where a thread stands that are looked at."""
LOCKED: Final = "L"
"""Waits for the interpreter's lock; not one of the kernel's letters."""
STATES: Final = {
    "T": "is stopped (by a signal or a debugger)",
    "t": "is held by a debugger",
    "D": "waits for a disk",
    LOCKED: "waits for Python's global lock, which another of its threads holds",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stand:
    """Where one rank stands."""

    rank: int
    host: str
    last_step: int
    state: str
    """The kernel's letter for it: R, S, D, T ..., or LOCKED."""
    stacks: str
    """What faulthandler wrote; empty: nothing came."""


def accuse(stands: Mapping[int, Stand]) -> Traced:
    """The rank that keeps the others waiting, and what is said of it; neither where nothing tells them apart."""
    ranks = [stands[rank] for rank in sorted(stands)]
    stopped = [(s, STATES[s.state]) for s in ranks if s.state in STATES]
    behind = [(s, f"is at step {s.last_step}, behind the others") for s in ranks if _is_behind(s, ranks)]
    elsewhere = [(s, f"stands in {_place(s)}") for s in ranks if _place(s) and not _waits(s)]
    for found in (stopped, behind, elsewhere):
        if len(found) == 1 and (len(ranks) > 1 or found is stopped):
            stand, what = found[0]
            return Traced(rank=stand.rank, text=f"rank {stand.rank} (host {stand.host}) {what}")
    return Traced(rank=None)


def _is_behind(one: Stand, ranks: list[Stand]) -> bool:
    return all(one.last_step < other.last_step for other in ranks if other is not one) and len(ranks) > 1


def _waits(stand: Stand) -> bool:
    return any(WAITING.search(frame) for frame in _frames(stand.stacks)[:NEAR])


def _place(stand: Stand) -> str:
    """ "collate (loop.py:71)", from the first frame."""
    frames = _frames(stand.stacks)
    told = re.match(r'File "(?:.*/)?([^"/]*)", line (\d+) in (.*)', frames[0]) if frames else None
    return f"{told[3]} ({told[1]}:{told[2]})" if told else ""


def _frames(stacks: str) -> list[str]:
    """Frames of the main thread, the innermost first."""
    threads = [
        [line.strip() for line in part.splitlines()[1:]] for part in re.split(r"\n(?=\S*.*?[Tt]hread 0x)", stacks)
    ]
    main = [frames for frames in threads if any("runpy" in frame or "in <module>" in frame for frame in frames)]
    return [frame for frame in (main or threads or [[]])[-1] if frame.startswith("File ")]
