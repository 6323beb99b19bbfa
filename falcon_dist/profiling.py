"""A torch trace of a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from falcon_dist.contract import UserError

WARM_UP: Final = 2
"""Steps that are let pass: kernels are made and memory is taken in them."""


class ProfileCallback(TrainerCallback):  # type: ignore[misc]
    """Writes ``trace.json.gz`` for chrome://tracing or Perfetto when ``steps`` steps have been traced."""

    def __init__(self, steps: int, folder: Path, told: Callable[[str], None]) -> None:
        self._steps = steps
        self._file = folder / "trace.json.gz"
        self._told = told
        self._profile: profile | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins after the warm-up."""
        if state.global_step == WARM_UP:
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends when all steps are in."""
        if state.global_step == WARM_UP + self._steps:
            self._write(self._steps)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ends with fewer steps where training stops before."""
        self._write(state.global_step - WARM_UP)

    def _write(self, steps: int) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._file))
            self._profile = None
            self._told(f"trace of {steps} steps: {self._file}")


def check_profile(steps: int, steps_to_take: int) -> None:
    """Raises UserError where so many steps cannot be traced."""
    if steps < 0:
        raise UserError(f"report.profile: must be 0 or more: {steps}")
    if steps and steps + WARM_UP > steps_to_take:
        raise UserError(
            f"report.profile: {steps} steps after {WARM_UP} to warm up are more than the {steps_to_take} of this run"
        )
