"""Where a resumed run goes on, and whether it may."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falcon_dist import checkpoint, identity, tensor_file, train_state
from falcon_dist.contract import UserError
from falcon_dist.engine.named import NamedOptimizer
from falcon_dist.process_group import agree_on
from falcon_dist.run import Run, run_facts
from falcon_dist.team import Team
from falcon_dist.train_state import Kept


def resume_point(run: Run, team: Team, below: int | None = None) -> checkpoint.Checkpoint | None:
    """The newest checkpoint that verifies, chosen by rank 0 for all; None where none was ever made.

    Of files of tensors only the size is looked at: ``restore`` hashes them as it reads them.

    Args:
        run: the run to go on with.
        team: its ranks.
        below: only checkpoints of earlier steps; the newer ones were refused.

    Raises:
        UserError: there are checkpoints but none verifies, or the newest was trained with something else.
    """
    step = 0
    if run.world.is_main:
        checkpoint.clear_partial(run.checkpoints)
        choice = _choice(run, below)
        for path, reason in choice.refused:
            run.reporter.line(f"refused {path}: {reason}")
        step = choice.newest.step if choice.newest else -len(choice.refused)
    team.meet(run.world.world_size)  # what a save that was cut off has left may take long to remove
    step = agree_on(step)
    if step < 0 or (step == 0 and below is not None):
        raise UserError(f'--resume: no checkpoint in "{run.checkpoints}" can be trusted; start a new run')
    if step == 0:
        run.reporter.line("no checkpoint to resume from; starting at step 0")
        return None
    chosen = _told_by_rank_0(run, team, step)
    _check_same_run(run, chosen)
    return chosen


def _choice(run: Run, below: int | None) -> checkpoint.Choice:
    """Where none has the optimizer's state, one without: ``restore`` says what is missing."""
    choice = checkpoint.newest_verified(run.checkpoints, below=below, tensors=False, with_state=True)
    if choice.newest is None and any(reason == checkpoint.NO_STATE for _, reason in choice.refused):
        return checkpoint.newest_verified(run.checkpoints, below=below, tensors=False)
    return choice


def _told_by_rank_0(run: Run, team: Team, step: int) -> checkpoint.Checkpoint:
    """The checkpoint as rank 0 reads it; other hosts may not have it."""
    path, key = run.checkpoints / checkpoint.folder_name(step), f"resume/{step}/facts"
    if run.world.is_main:
        team.board.set(key, json.dumps(dict(checkpoint.read(path).facts)))
    return checkpoint.Checkpoint(path, step, json.loads(team.board.get(key)))


def restore(
    run: Run,
    team: Team,
    chosen: checkpoint.Checkpoint,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: NamedOptimizer,
) -> checkpoint.Checkpoint:
    """Gives model and optimizer the checkpoint's state on all ranks, also on those that do not see its folder.

    Returns:
        The checkpoint whose state that is: an older one where bytes of the chosen one are not what was written.

    Raises:
        UserError: the state is not there, or is divided over ranks of which some do not see it, or no checkpoint
            can be trusted.
    """
    if len(team.writers) == run.world.world_size:
        chosen = _newest_that_reads(run, team, chosen, lambda p: run.strategy.load(p, model, tokenizer, optimizer))
    else:
        kept = run.strategy.kept(model, tokenizer, optimizer)
        if kept is None:
            raise UserError(
                f'--resume: "{run.checkpoints}" is not on all hosts; put the run into a folder that they share'
            )
        read: dict[Path, tuple[dict[str, torch.Tensor], int]] = {}
        leads = team.leads
        chosen = _newest_that_reads(
            run,
            team,
            chosen,
            lambda path: read.update({path: train_state.load(path, kept, team.get_on)}) if leads else None,
        )
        state, steps = _handed_out(team, kept, read.get(chosen.path))
        optimizer.load_named_state(train_state.parameter_names(model), state, steps)
    run.reporter.line(f"resuming from {chosen.path}")
    return chosen


def _newest_that_reads(
    run: Run, team: Team, chosen: checkpoint.Checkpoint, load: Callable[[Path], None]
) -> checkpoint.Checkpoint:
    """Loads on every rank the chosen checkpoint, or the newest older one whose every byte all ranks read as written."""
    while fault := _fault_of_any(team, chosen.step, partial(load, chosen.path)):
        run.reporter.line(f"refused {chosen.path}: {fault}")
        older = resume_point(run, team, below=chosen.step)
        assert older is not None
        chosen = older
    return chosen


def _fault_of_any(team: Team, step: int, load: Callable[[], None]) -> str | None:
    """What the first of the ranks that did not read what was written says of it."""
    fault = ""
    try:
        load()
    except checkpoint.DamagedError as error:
        fault = str(error)
    return next(filter(None, team.everyone_says(f"resume/{step}", fault, dist.get_world_size())), None)


def _handed_out(
    team: Team, kept: Kept, read: tuple[dict[str, torch.Tensor], int] | None
) -> tuple[dict[str, torch.Tensor], int]:
    """Rank 0's weights and state, on all ranks."""
    if read is not None:
        state, steps = read
        spec = {name: [tensor_file.DTYPES[t.dtype], list(t.shape)] for name, t in state.items()}
        team.board.set("resume/state", json.dumps([steps, spec]))
    else:
        steps, spec = json.loads(team.board.get("resume/state"))
        state = {name: torch.empty(shape, dtype=tensor_file.KINDS[kind]) for name, (kind, shape) in spec.items()}
    for tensor in (*kept.weights.values(), *state.values()):
        dist.broadcast(tensor.detach().view(-1).view(torch.uint8), src=0)
    return state, steps


def _check_same_run(run: Run, chosen: checkpoint.Checkpoint) -> None:
    """Raises UserError where going on would train something else than the run began with."""
    now = run_facts(run)
    if chosen.facts.get("rows") == run.store.of_manifest.hex():
        now["rows"] = chosen.facts["rows"]
    if odd := identity.differences(chosen.facts, now, (*identity.MADE_OF, *identity.ADAPTERS, *identity.SETTINGS)):
        for line in identity.table(odd):
            run.reporter.line(line)
        name, then, here = odd[0]
        others = f" (and {len(odd) - 1} more, see above)" if odd[1:] else ""
        raise UserError(
            f'--resume: {name} was "{then}" when {chosen.path.name} was saved and is "{here}" now{others}; '
            "resume with the same, or start a new run"
        )
    if odd := identity.differences(chosen.facts, now, identity.TOLD_ONLY):
        for line in (f"{chosen.path.name} was saved by another version:", *identity.table(odd)):
            run.reporter.line(line)
    if odd := identity.differences(chosen.facts, now, [key for key in now if key.startswith(identity.CHANGED)]):
        for line in ("with other settings from here on:", *identity.table(odd)):
            run.reporter.line(line)
    if missing := identity.unknown(chosen.facts, now):
        run.reporter.line(f"not compared, for {chosen.path.name} does not tell of it: {', '.join(missing)}")
