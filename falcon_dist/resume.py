"""Where a resumed run goes on, and whether it may."""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falcon_dist import checkpoint, identity, tensor_file, train_state
from falcon_dist.contract import UserError
from falcon_dist.engine.named import NamedOptimizer
from falcon_dist.process_group import agree_on
from falcon_dist.run import Run, run_facts
from falcon_dist.team import Team


def resume_point(run: Run, team: Team) -> checkpoint.Checkpoint | None:
    """The newest checkpoint that verifies, chosen by rank 0 for all; None where none was ever made.

    Raises:
        UserError: there are checkpoints but none verifies, or the newest was trained with something else.
    """
    step = 0
    if run.world.is_main:
        checkpoint.clear_partial(run.checkpoints)
        choice = checkpoint.newest_verified(run.checkpoints)
        for path, reason in choice.refused:
            run.reporter.line(f"refused {path}: {reason}")
        step = choice.newest.step if choice.newest else -len(choice.refused)
    step = agree_on(step)
    if step < 0:
        raise UserError(f'--resume: no checkpoint in "{run.checkpoints}" can be trusted; start a new run')
    if step == 0:
        run.reporter.line("no checkpoint to resume from; starting at step 0")
        return None
    chosen = _told_by_rank_0(run, team, step)
    _check_same_run(run, chosen)
    run.reporter.line(f"resuming from {chosen.path}")
    return chosen


def _told_by_rank_0(run: Run, team: Team, step: int) -> checkpoint.Checkpoint:
    """The checkpoint as rank 0 reads it; other hosts may not have it."""
    path = run.checkpoints / checkpoint.folder_name(step)
    if run.world.is_main:
        team.board.set("resume/facts", json.dumps(dict(checkpoint.read(path).facts)))
    return checkpoint.Checkpoint(path, step, json.loads(team.board.get("resume/facts")))


def restore(
    run: Run,
    team: Team,
    chosen: checkpoint.Checkpoint,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: NamedOptimizer,
) -> None:
    """Gives model and optimizer the checkpoint's state on all ranks, also on those that do not see its folder.

    Raises:
        UserError: the state is not there, or is divided over ranks of which some do not see it.
    """
    if len(team.writers) == run.world.world_size:
        run.strategy.load(chosen.path, model, tokenizer, optimizer)
        return
    kept = run.strategy.kept(model, tokenizer, optimizer)
    if kept is None:
        raise UserError(f'--resume: "{run.checkpoints}" is not on all hosts; put the run into a folder that they share')
    state, steps = train_state.load(chosen.path, kept) if team.leads else ({}, 0)
    if team.leads:
        spec = {name: [tensor_file.DTYPES[t.dtype], list(t.shape)] for name, t in state.items()}
        team.board.set("resume/state", json.dumps([steps, spec]))
    else:
        steps, spec = json.loads(team.board.get("resume/state"))
        state = {name: torch.empty(shape, dtype=tensor_file.KINDS[kind]) for name, (kind, shape) in spec.items()}
    for tensor in (*kept.weights.values(), *state.values()):
        dist.broadcast(tensor.detach().view(-1).view(torch.uint8), src=0)
    optimizer.load_named_state(train_state.parameter_names(model), state, steps)


def _check_same_run(run: Run, chosen: checkpoint.Checkpoint) -> None:
    """Raises UserError where going on would train something else than the run began with."""
    now = run_facts(run)
    if odd := identity.differences(chosen.facts, now, (*identity.MADE_OF, *identity.SETTINGS)):
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
    if missing := identity.unknown(chosen.facts):
        run.reporter.line(f"not compared, for {chosen.path.name} does not tell of it: {', '.join(missing)}")
