"""Where a resumed run goes on, and whether it may."""

from __future__ import annotations

from falcon_dist import checkpoint
from falcon_dist.contract import UserError
from falcon_dist.process_group import agree_on
from falcon_dist.run import Run, run_facts


def resume_point(run: Run) -> checkpoint.Checkpoint | None:
    """The newest checkpoint that verifies, chosen by rank 0 for all; None where none was ever made.

    Raises:
        UserError: there are checkpoints but none verifies, or the newest is of another run.
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
    chosen = checkpoint.read(run.checkpoints / checkpoint.folder_name(step))
    _check_same_run(run, chosen)
    run.reporter.line(f"resuming from {chosen.path}")
    return chosen


def _check_same_run(run: Run, chosen: checkpoint.Checkpoint) -> None:
    """Raises UserError where going on would train other rows than the run began with."""
    now = run_facts(run)
    for key in ("rows", "global_batch", "seed", "total_steps", "precision", "strategy"):
        if chosen.facts[key] != now[key]:
            raise UserError(
                f'--resume: {key} was "{chosen.facts[key]}" when {chosen.path.name} was saved and is "{now[key]}" '
                "now; resume with the same settings, or start a new run"
            )
