"""Notices that no rank finishes a step any more, or that nothing is done at all where no step is due.

Knows no clock: monotonic times are handed in.
"""

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
SIGN_S: Final = 0.1
"""Processor time that is a sign of work."""
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
    _used_s: dict[int, float] = field(default_factory=dict)
    """By node_rank, processor time of what it runs when that was a sign."""
    _sign_at: float | None = None
    """When anything was said or done."""
    _ended_at: float | None = None
    """When the first of them ended."""
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def heard(self, node_rank: int, used_s: float | None, now: float) -> None:
        """A word of an agent; with ``used_s`` it only says how much processor time its processes have used."""
        if used_s is None:
            self._sign_at = now
        elif abs(used_s - self._used_s.get(node_rank, 0.0)) >= SIGN_S:  # less: what was counted has ended
            self._sign_at, self._used_s[node_rank] = now, used_s

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
        if self.median_s is None:
            return self.first_s
        return max(self.least_s, MEDIANS * self.median_s)

    @property
    def first_s(self) -> float:
        """How long what nobody knows the usual time of may take."""
        return 10 * self.least_s if self.least_s < LEAST_S else max(FIRST_STEP_S, 10 * self.least_s)

    def overdue(self, now: float, *, preparing: bool = False) -> str | None:
        """What to say where a step is overdue, else None.

        One rank outside training holds up all others, which is no fault: nothing is due then, but that anything is
        done at all, and the end of those that others have left behind.
        """
        if not self.least_s or not (preparing or self._ranks):
            return None
        if still := self._still(now):
            return f"{still} {'while hosts prepare' if preparing else 'by any rank'}"
        return None if preparing else self._step_overdue(now)

    def _still(self, now: float) -> str | None:
        self._sign_at = now if self._sign_at is None else self._sign_at
        quiet = now - self._sign_at
        return f"nothing was said and no processor time used for {quiet:.0f} s" if quiet > self.first_s else None

    def _step_overdue(self, now: float) -> str | None:
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
