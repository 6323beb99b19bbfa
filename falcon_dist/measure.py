"""What is measured of the model before, along and after training: held-out rows by all ranks, answers by rank 0."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falcon_dist import checkpoint
from falcon_dist.contract import UserError
from falcon_dist.evaluate import held_out
from falcon_dist.generate import Sampling, answer
from falcon_dist.monitor import (
    EVALUATIONS_FILE,
    Monitor,
    Point,
    Verdict,
    evaluation_lines,
    prompts_of,
    write_evaluation,
)
from falcon_dist.process_group import agree_on
from falcon_dist.run import Run
from falcon_dist.team import Team

BASE_FILE: Final = "base.json"
"""What was measured before training, so that a resumed run need not measure it again."""


def make_monitor(
    run: Run,
    team: Team,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chosen: checkpoint.Checkpoint | None,
) -> Monitor:
    """Evaluation along the way, going on from what the chosen checkpoint knows."""

    def tell(step: int, figures: Mapping[str, Any]) -> None:
        if run.world.is_main:
            if reason := write_evaluation(run.folder, step, figures):
                run.reporter.line(f"{EVALUATIONS_FILE} cannot be written: {reason}; training goes on")
            for line in evaluation_lines(step, figures):
                run.reporter.line(line)

    return Monitor(
        run.config.evaluate,
        total_steps=run.schedule.total_steps,
        points=[Point(*told) for told in chosen.facts.get("evaluations", ())] if chosen else (),
        measure=lambda: measure(run, team, model, tokenizer, "evaluate"),
        tell=tell,
    )


def catch_up(run: Run, monitor: Monitor, start: int) -> Verdict:
    """The held-out figures of the step that a run goes on from, where they were due and the checkpoint lacks them.

    A survivor's checkpoint is written between a step and its evaluation. To be called by all ranks, before the trainer
    wraps the model.
    """
    known = any(point.step == start for point in monitor.points)
    if not start or known or not monitor.is_due(start) or not len(run.store.evaluation):
        return Verdict()
    return monitor.after_step(start)


def tell_early_stop(run: Run, monitor: Monitor, step: int) -> None:
    """Says why training ended at this step, if it was not the last one."""
    if monitor.stopped:
        run.reporter.line(f"stopped early at step {step}: no lower held-out loss since step {monitor.best_step}")


def measure_base(run: Run, team: Team, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Figures of the model before training, where they are asked for; a resumed run finds them kept."""
    file = run.folder / BASE_FILE
    kept = _kept(file) if run.world.is_main else None
    if agree_on(int(kept is not None)):
        return kept or {}
    if not run.config.evaluate.base:
        return {}
    measured = measure(run, team, model, tokenizer, "evaluate base")
    if run.world.is_main:
        _keep(file, json.dumps(measured, indent=1) + "\n")
    return measured


def _keep(path: Path, text: str) -> None:
    """Whole or not at all.

    Raises:
        UserError: there is no room for it; nothing was trained.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text(text)
        partial.rename(path)
    except OSError as error:
        raise UserError(f'evaluate.base: cannot write "{path}": {error.strerror}; make room') from error


def _kept(file: Path) -> dict[str, Any] | None:
    """What was measured before; None: it was not, or a host that went down took what was written."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def measure(
    run: Run, team: Team, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, phase: str
) -> dict[str, Any]:
    """Held-out loss by all ranks, answers by rank 0."""
    figures: dict[str, Any] = {}
    with run.reporter.phase(phase):
        if len(run.store.evaluation):
            found = held_out(model, run.store.evaluation, run.world, run.config.precision, team)
            figures["held_out"] = found.as_dict()
        figures["answers"] = _answers(run, team, model, tokenizer)
    return figures


def _answers(run: Run, team: Team, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Rank 0's answers, which the others wait for."""
    prompts = prompts_of(run.config.evaluate) if run.world.is_main else ()
    sampling = Sampling(max_new_tokens=run.config.evaluate.max_new_tokens)
    found = {}
    for prompt in prompts:
        found[prompt] = answer(model, tokenizer, prompt, sampling, lambda _: team.get_on())
    team.meet(run.world.world_size)
    return found
