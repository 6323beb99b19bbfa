"""Notices that no rank finishes a step any more. Knows no clock: monotonic times are handed in."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from launcher.patience import LEAST_S

TRAINING: Final = "train"
"""The phase in which steps are due; in any other one (loading, saving, evaluating) nothing is."""
MEDIANS: Final = 5.0
FIRST_STEP_S: Final = 1800.0
"""How long the first step may take at least, when nothing is known of how long steps take; less only by a short
``least_s``."""
REMEMBERED: Final = 64
AFTER_OTHERS_S: Final = 1800.0
"""How long a rank may take to end when another one has: what they do last they do together."""


@dataclass(slots=True)
class _Seen:
    """One rank."""

    phase: str
    since: float
    """When it last finished a step or entered the phase."""
    steps: int = 0


@dataclass(slots=True)
class Watch:
    """The steps of an attempt. Ranks that tell no phases (other people's programs) are not watched."""

    least_s: float = LEAST_S
    """0: nothing is ever due."""
    _ranks: dict[int, _Seen] = field(default_factory=dict)
    _ended_at: float | None = None
    """When the first of them ended."""
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def entered(self, rank: int, phase: str, now: float) -> None:
        """A rank has begun with something else."""
        seen = self._ranks.setdefault(rank, _Seen(phase, now))
        seen.phase, seen.since = phase, now

    def stepped(self, rank: int, now: float) -> None:
        """A rank has finished a step."""
        if seen := self._ranks.get(rank):
            if seen.steps and seen.phase == TRAINING:
                self._seconds.append(now - seen.since)
            seen.steps, seen.since = seen.steps + 1, now

    def ended(self, rank: int, now: float) -> None:
        """A rank is no more."""
        if self._ranks.pop(rank, None) and self._ended_at is None:
            self._ended_at = now

    @property
    def median_s(self) -> float | None:
        """Seconds of a usual step; None: none is known."""
        return statistics.median(self._seconds) if self._seconds else None

    @property
    def limit_s(self) -> float:
        """How long no step may come."""
        first = 10 * self.least_s if self.least_s < LEAST_S else max(FIRST_STEP_S, 10 * self.least_s)
        return first if self.median_s is None else max(self.least_s, MEDIANS * self.median_s)

    def overdue(self, now: float) -> str | None:
        """What to say where a step is overdue, else None.

        One rank outside training holds up all others, which is no fault: nothing is due then, but the end of those that
        others have left behind.
        """
        if not self.least_s or not self._ranks:
            return None
        if self._ended_at is not None and now - self._ended_at > AFTER_OTHERS_S:
            left = ", ".join(map(str, sorted(self._ranks)))
            return f"rank {left} has not ended {AFTER_OTHERS_S:g} s after another one"
        if any(seen.phase != TRAINING for seen in self._ranks.values()):
            return None
        quiet = min(now - seen.since for seen in self._ranks.values())
        if quiet <= self.limit_s:
            return None
        usual = "none before" if self.median_s is None else f"{self.median_s:.1f} s is usual"
        return f"no rank has finished a step for {quiet:.0f} s ({usual})"
