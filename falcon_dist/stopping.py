"""Ending early in good order: rank 0 is asked, all ranks agree on the step."""

from __future__ import annotations

import signal
from types import FrameType

from falcon_dist.contract import STOP_SIGNAL
from falcon_dist.metrics import Reporter
from falcon_dist.process_group import agree_on


class Stopper:
    """Whether this run was asked to end before its last step."""

    def __init__(self, reporter: Reporter) -> None:
        """Listens for STOP_SIGNAL from here on, and says so; to be made by the main thread."""
        self._asked = False
        self.agreed = False
        """All ranks end after the step they have just done."""
        signal.signal(STOP_SIGNAL, self._on_signal)
        reporter.takes("stop")

    def after_step(self) -> bool:
        """Called by all ranks after each step: rank 0's answer on every rank, one small broadcast."""
        self.agreed = bool(agree_on(int(self._asked)))
        return self.agreed

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
