"""Which rank holds up the others, or whether the network does: from every rank's own work and waiting. Pure.

The slow rank is the one that waits least: its peers spend in the sum of gradients what it spends on its own work.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

STEPS: Final = 20
"""A rank is judged by the medians of so many steps in a row."""
SLOW: Final = 0.7
"""Its peers need less than this share of its time for the same work."""
LONG_WAIT: Final = 0.6
"""More than this share of a step is waited by every rank, the slowest included: that is the network."""
LEAST_WAIT_S: Final = 0.1
"""Steps shorter than that are of models so small that waiting is all they do."""


@dataclass(slots=True)
class Paces:
    """The last steps of every rank of an attempt."""

    hosts: Mapping[int, str]
    """Host of each rank."""
    _busy: dict[int, deque[float]] = field(default_factory=dict)
    _waited: dict[int, deque[float]] = field(default_factory=dict)
    _told: set[int | None] = field(default_factory=set)

    def stepped(self, rank: int, told: Mapping[str, Any]) -> str | None:
        """A rank has finished a step and tells "busy_s" and "waited_s"; returns what is to be said, each thing once."""
        match told:
            case {"busy_s": float(busy_s), "waited_s": float(waited_s)}:
                self._busy.setdefault(rank, deque(maxlen=STEPS)).append(busy_s)
                self._waited.setdefault(rank, deque(maxlen=STEPS)).append(waited_s)
        if rank != max(self.hosts):  # once a step, not once for every rank
            return None
        if len(self.hosts) < 2 or any(len(self._busy.get(r, ())) < STEPS for r in self.hosts):
            return None
        busy = {r: statistics.median(self._busy[r]) for r in self.hosts}
        waited = min(statistics.median(self._waited[r]) for r in self.hosts)
        return self._slow_rank(busy) or self._slow_network(busy, waited)

    def _slow_rank(self, busy: Mapping[int, float]) -> str | None:
        slowest = max(busy, key=lambda rank: busy[rank])
        others = statistics.median(seconds for rank, seconds in busy.items() if rank != slowest)
        if slowest in self._told or others >= SLOW * busy[slowest]:
            return None
        self._told.add(slowest)
        return (
            f"rank {slowest} (host {self.hosts[slowest]}) is slow: {_shown(busy[slowest])} of work in a step, the "
            f"others need {_shown(others)} and wait for it; look for other programs, heat and swapping there"
        )

    def _slow_network(self, busy: Mapping[int, float], waited: float) -> str | None:
        step = max(busy.values()) + waited
        if None in self._told or waited < LEAST_WAIT_S or waited <= LONG_WAIT * step:
            return None
        self._told.add(None)
        return (
            f"communication takes {_shown(waited)} of a step of {_shown(step)} on every rank: the network holds the "
            "run up; see falcon doctor, or let a step have more work (loop.grad_accum)"
        )


def _shown(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
