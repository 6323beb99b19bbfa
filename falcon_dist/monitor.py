"""Held-out figures along the way, and what follows from them: the best step, and when to stop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from falcon_dist import lines
from falcon_dist.config import EvaluateConfig, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.evaluate import HeldOut
from falcon_dist.readers import read_file
from falcon_dist.records import Record

EVALUATIONS_FILE: Final = "evaluations.jsonl"
"""In the run folder: one line for each evaluation."""


class Point(NamedTuple):
    """The held-out loss at a step."""

    step: int
    loss: float


class Verdict(NamedTuple):
    """What an evaluation asks of the loop."""

    save: bool = False
    """This step is the best so far and is to be kept."""
    stop: bool = False
    """No better step came for too long."""


def best_of(points: Sequence[Point], min_gain: float = 0.0) -> Point | None:
    """The best step: each must be better by ``min_gain`` than the best before it, and a number."""
    best = None
    for found in points:
        if math.isfinite(found.loss) and (best is None or found.loss < best.loss - min_gain):
            best = found
    return best


def exhausted(points: Sequence[Point], patience: int | None, min_gain: float) -> bool:
    """Whether ``patience`` evaluations in a row brought nothing better."""
    best = best_of(points, min_gain)
    if patience is None or best is None:
        return False
    return sum(found.step > best.step for found in points) >= patience


def check_evaluate(config: EvaluateConfig, held_out_rows: int) -> None:
    """Raises UserError for settings that need what there is not."""
    if config.patience is not None and not held_out_rows:
        raise UserError("evaluate.patience needs held-out rows: set data.eval_share or data.eval_name")
    if config.every and not (held_out_rows or config.prompts or config.prompts_file):
        raise UserError("evaluate.every has nothing to evaluate: set data.eval_share or evaluate.prompts_file")


def evaluates(config: TrainConfig) -> bool:
    """Whether anything is measured besides the training loss: held-out rows, or answers to prompts."""
    return bool(
        config.data.eval_share or config.data.eval_name or config.evaluate.prompts or config.evaluate.prompts_file
    )


def prompts_of(config: EvaluateConfig) -> tuple[str, ...]:
    """The prompts of the configuration, then those of its file.

    Raises:
        UserError: the file is missing or has something else in it.
    """
    if config.prompts_file is None:
        return config.prompts
    return (*config.prompts, *read_prompts(Path(config.prompts_file)))


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: the lines of a .txt, or "prompt" of each record of any other format.

    Raises:
        UserError: the file is missing, has no prompt or a record without one.
    """
    if not path.is_file():
        raise UserError(f'prompts: no such file: "{path}"')
    prompts = []
    for item in read_file(path, "line"):
        found = item.values.get("prompt", item.values.get("text")) if isinstance(item, Record) else None
        if not isinstance(found, str) or not found.strip():
            raise UserError(f'{item.place}: no text in "prompt"')
        prompts.append(found.strip())
    if not prompts:
        raise UserError(f'prompts: no prompt in "{path}"')
    return prompts


class Monitor:
    """Measures when it is due and remembers; every rank holds the same one and comes to the same verdict."""

    def __init__(
        self,
        config: EvaluateConfig,
        *,
        total_steps: int,
        points: Sequence[Point],
        measure: Callable[[], dict[str, Any]],
        tell: Callable[[int, Mapping[str, Any]], None],
    ) -> None:
        self._config = config
        self._total_steps = total_steps
        self._measure = measure
        self._tell = tell
        self.points = list(points)
        self.last: tuple[int, dict[str, Any]] | None = None
        """The newest evaluation: its step and figures."""

    def is_due(self, step: int) -> bool:
        """Every so many steps, and at the last one."""
        every = self._config.every
        return bool(every) and (step % every == 0 or step == self._total_steps)

    def after_step(self, step: int) -> Verdict:
        """Evaluates where it is due."""
        if not self.is_due(step):
            return Verdict()
        figures = self._measure()
        self.last = (step, figures)
        self._tell(step, figures)
        if "held_out" not in figures:
            return Verdict()
        self.points.append(Point(step, figures["held_out"]["loss"]))
        return Verdict(save=self.best_step == step, stop=self.stopped)

    @property
    def best_step(self) -> int | None:
        best = best_of(self.points, self._config.min_gain)
        return best.step if best else None

    @property
    def stopped(self) -> bool:
        return exhausted(self.points, self._config.patience, self._config.min_gain)


def evaluation_lines(step: int, figures: Mapping[str, Any]) -> list[str]:
    """An evaluation for a person."""
    told = [f"step {step}: held-out {HeldOut.from_dict(figures['held_out'])}"] if "held_out" in figures else []
    for prompt, text in figures.get("answers", {}).items():
        told += [f"step {step}: prompt: {prompt}", f"  {text}"]
    return told


def write_evaluation(folder: Path, step: int, figures: Mapping[str, Any]) -> str | None:
    """Appends to evaluations.jsonl of a run folder; why there is no room, or None.

    A step that is done again after a resume stands there twice.
    """
    with (folder / EVALUATIONS_FILE).open("ab", buffering=0) as file:
        return lines.append(file, json.dumps({"step": step, **figures}, ensure_ascii=False) + "\n")
