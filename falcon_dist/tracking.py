"""TensorBoard, W&B and MLflow through the Trainer's own integrations, told by rank 0 alone."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from trl import SFTConfig

from falcon_dist.config import ReportConfig
from falcon_dist.contract import UserError

TENSORBOARD_FOLDER: Final = "tensorboard"
"""In the run folder; W&B and MLflow have places of their own, which their variables name."""


def check_tracking(config: ReportConfig) -> None:
    """Raises UserError for a tracker that is not known or not installed."""
    known = ("tensorboard", "wandb", "mlflow")
    for name in config.to:
        if name not in known:
            raise UserError(f'report.to: no such tracker: "{name}"; known: {", ".join(known)}')
        if importlib.util.find_spec(name) is None:
            raise UserError(f'report.to: package is not installed: "{name}"; run pip install {name}')


def trackers(config: ReportConfig, folder: Path, start: int) -> list[TrainerCallback]:
    """The chosen integrations, counting steps on from ``start``."""
    return [Tracker(_integration(name, folder, start), start, CLOSERS.get(name)) for name in config.to]


def _close_wandb() -> None:
    import wandb

    wandb.finish()


def _close_mlflow() -> None:
    import mlflow

    mlflow.flush_async_logging()


CLOSERS: Final[Mapping[str, Callable[[], None]]] = {"wandb": _close_wandb, "mlflow": _close_mlflow}
"""The integrations leave the last words to the interpreter's end, which a rank does not wait for."""


def _integration(name: str, folder: Path, start: int) -> TrainerCallback:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        # All starts of a run are one curve; steps that are done again take the place of what was told of them.
        return TensorBoardCallback(SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=start + 1))
    return get_reporting_integration_callbacks([name])[0]()


class Tracker(TrainerCallback):  # type: ignore[misc]
    """An integration that sees the run's own steps: the Trainer counts from 0 again after a resume."""

    def __init__(self, inner: TrainerCallback, start: int, close: Callable[[], None] | None = None) -> None:
        self._inner = inner
        self._start = start
        self._close = close

    def _shifted(self, state: TrainerState) -> TrainerState:
        shifted = copy.copy(state)
        shifted.global_step += self._start
        return shifted

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Opens the tracker's run."""
        self._inner.on_train_begin(args, self._shifted(state), control, **kwargs)

    def on_log(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hands on a step's figures, or an evaluation's."""
        self._inner.on_log(args, self._shifted(state), control, **kwargs)

    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Closes the tracker's run, with all that was told it."""
        self._inner.on_train_end(args, self._shifted(state), control, **kwargs)
        if self._close is not None:
            self._close()


def evaluation_logs(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation under the Trainer's names."""
    found = figures.get("held_out", {})
    return {f"eval_{name}": found[name] for name in ("loss", "perplexity") if found.get(name) is not None}
