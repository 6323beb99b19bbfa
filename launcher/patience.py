"""How long a run is waited for. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from falcon_dist.contract import EMERGENCY_GRACE_S

LEAST_S: Final = 60.0
"""A step is never overdue earlier."""
STOP_GRACE_S: Final = 90.0
"""How long ranks may take to end their step and save when the run has to make way."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a run is waited for."""

    hang_s: float = LEAST_S
    """A step is overdue after this, or five times the usual if that is longer; 0: never."""
    emergency_grace_s: float = EMERGENCY_GRACE_S
    stop_grace_s: float = STOP_GRACE_S
