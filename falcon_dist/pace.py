"""What of a step a rank spends on its own work, and what on waiting for its peers: a slow rank waits least.

Measured where the two part without a collective's help: autograd tells when this rank's last gradient is there, the
Trainer when all gradients are summed over ranks.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback


class Spent(NamedTuple):
    """Seconds of one step on one rank."""

    busy_s: float
    """From the step's begin to this rank's last gradient."""
    waited_s: float
    """From there until the gradients of all ranks were summed."""


class Pace(TrainerCallback):  # type: ignore[misc]
    """Knows the last step's ``spent``; None where gradients are summed or weights changed within backward.

    Args:
        model: whose gradients are watched; None for strategies that do so.
    """

    def __init__(self, model: torch.nn.Module | None) -> None:
        self._began: float | None = None
        self._own_work_done: float | None = None
        self._summed: float | None = None
        for parameter in model.parameters() if model is not None else ():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]

    @property
    def spent(self) -> Spent | None:
        """Of the last step."""
        began, done, summed = self._began, self._own_work_done, self._summed
        if began is None or done is None or summed is None:
            return None
        return Spent(done - began, summed - done)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """All ranks are here: they have just counted the step's tokens together."""
        self._began = time.monotonic()
        self._own_work_done = self._summed = None

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Gradients are summed and clipped."""
        self._summed = time.monotonic()

    def _on_gradient(self, _: torch.Tensor) -> None:
        self._own_work_done = time.monotonic()
