"""How often to save: what saving costs against the steps that a failure costs. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

HOUR_S: Final = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """One save as training felt it, on a clock that only goes forward."""

    step: int
    began_s: float
    ended_s: float
    """Training went on; what is written after that is written beside it."""

    @property
    def stall_s(self) -> float:
        """How long training stood still."""
        return self.ended_s - self.began_s


def best_interval_s(stall_s: float, failure_s: float) -> float:
    """Seconds of training between two saves for which the least time is lost.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006), equation 37;
    its first term is J. W. Young's of 1974, sqrt(2 x stall x failure).

    Args:
        stall_s: what one save costs, in seconds.
        failure_s: mean seconds between two failures of the run.

    >>> round(best_interval_s(1.0, 24 * 3600.0))
    415
    """
    if stall_s >= 2 * failure_s:
        return failure_s
    ratio = stall_s / (2 * failure_s)
    return math.sqrt(2 * stall_s * failure_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def advice(saves: Sequence[Saved], failure_hours: float) -> str | None:
    """What saving costs as it is, and how often it would pay; None before two saves: the first one is slower.

    Args:
        saves: in their order.
        failure_hours: mean hours between two failures of the run.
    """
    if len(saves) < 2 or saves[-1].step == saves[0].step:
        return None
    stall = statistics.median(save.stall_s for save in saves[1:])
    trained = saves[-1].began_s - saves[0].ended_s - sum(save.stall_s for save in saves[1:-1])
    step_s = trained / (saves[-1].step - saves[0].step)
    every = round((saves[-1].step - saves[0].step) / (len(saves) - 1))
    best = _rounded(best_interval_s(stall, failure_hours * HOUR_S) / step_s)
    cost = stall / (stall + every * step_s)
    return (
        f"saving every {every:,} steps costs {cost:.2%} of the time ({stall:.2g} s for each, "
        f"{step_s:.2g} s for a step); for one failure in {failure_hours:g} hours the least is lost with "
        f"checkpoint.every={best} (Young/Daly)"
    )


def _rounded(steps: float) -> int:
    """Two digits are as much as is known: 1234.5 -> 1200."""
    return max(1, int(float(f"{steps:.2g}")))
