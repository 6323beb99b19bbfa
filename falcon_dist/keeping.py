"""Which checkpoints are kept, which one is the best, and the link that people of 2023 look for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from falcon_dist import checkpoint
from falcon_dist.config import CheckpointConfig
from falcon_dist.contract import UserError
from falcon_dist.monitor import Point, best_of

BEST: Final = "best"
"""Link beside the checkpoints to the one of the lowest held-out loss."""
_ROTATED: Final = ".partial-rotated"


def check_keeping(config: CheckpointConfig, *, evaluates: bool) -> None:
    """Raises UserError for rules that need what there is not."""
    if config.keep_best and not evaluates:
        raise UserError("checkpoint.keep_best needs held-out figures: set evaluate.every and data.eval_share")


def expendable(steps: Iterable[int], config: CheckpointConfig, best: int | None) -> list[int]:
    """The steps whose checkpoints may go: all are kept unless keep_last is set. Pure.

    >>> expendable([10, 20, 30, 40, 50], CheckpointConfig(keep_last=2, keep_every=30, keep_best=True), best=10)
    [20]
    """
    if config.keep_last is None:
        return []
    *old, _ = [*sorted(steps), None]
    kept = set(old[-config.keep_last :])
    kept |= {step for step in old if config.keep_every and step % config.keep_every == 0}
    kept |= {best} if config.keep_best and best is not None else set()
    return [step for step in old if step not in kept]


def committed_steps(root: Path) -> list[int]:
    """Steps of the checkpoints in a folder."""
    names = (path.name.removeprefix("step-") for path in root.glob("step-*"))
    return sorted(int(name) for name in names if name.isdecimal())


def settle(
    root: Path,
    step: int,
    config: CheckpointConfig,
    points: Sequence[Point],
    *,
    min_gain: float = 0.0,
    refused: Container[int] = (),
) -> None:
    """What follows a commit: links that show the way to it, older checkpoints that may go now.

    Args:
        root: folder of checkpoints.
        step: the one that was committed.
        config: what is kept.
        points: held-out losses that were known when it was saved.
        min_gain: nats a token by which a loss must be lower to count as such.
        refused: steps whose checkpoints a resume did not trust: neither counted nor removed, for who counted them
            would remove sound ones in their favour.

    Raises:
        UserError: something that is no link is in the way of one.
        OSError: a checkpoint cannot be removed; the folder of checkpoints, or that of the links, cannot be written.
    """
    path = root / checkpoint.folder_name(step)
    there = [old for old in committed_steps(root) if old <= step and old not in refused]
    best = best_kept(there, points, min_gain)
    if config.keep_best and best is not None:
        point(root / BEST, root / checkpoint.folder_name(best), "checkpoint.keep_best")
    if config.links is not None:
        point(Path(config.links) / f"checkpoint-{step}", path, "checkpoint.links")
    rotate(root, there, config, best)
    if config.links is not None:
        drop_dead_links(Path(config.links))


def best_kept(there: Container[int], points: Sequence[Point], min_gain: float) -> int | None:
    """The best step that has a checkpoint: the save of a better one may have failed. Pure."""
    best = best_of([known for known in points if known.step in there], min_gain)
    return best.step if best else None


def rotate(root: Path, there: Sequence[int], config: CheckpointConfig, best: int | None) -> None:
    """Removes what may go, also what could not be removed before; to be called when the newest is committed.

    Args:
        root: folder of checkpoints.
        there: steps whose checkpoints count, from the oldest to the newest.
        config: what is kept.
        best: the step of the lowest held-out loss.
    """
    to_go_on = _newest_with_state(root, there)
    for gone in expendable(there, config, best):
        if gone != to_go_on:
            # Renamed first: half a checkpoint must never stand under the name of a whole one.
            path = root / checkpoint.folder_name(gone)
            path.rename(path.with_name(f"{path.name}{_ROTATED}-{os.getpid()}"))
    for partial in sorted(root.glob(f"step-*{_ROTATED}-*")):
        shutil.rmtree(partial)


def _newest_with_state(root: Path, there: Sequence[int]) -> int | None:
    """The step that a resume would go on from, where newer ones are kept without the optimizer's state."""
    for step in reversed(there):
        with suppress(checkpoint.DamagedError):
            if checkpoint.holds_state(root / checkpoint.folder_name(step)):
                return step
    return None


def point(link: Path, target: Path, key: str) -> None:
    """Makes ``link`` point at ``target`` in one step, in the place of an older link; ``key`` is the setting that asks.

    Raises:
        UserError: something that is no link is in the way.
    """
    if link.exists() and not link.is_symlink():
        raise UserError(f'{key}: "{link}" is in the way and no link; move it')
    link.parent.mkdir(parents=True, exist_ok=True)
    partial = link.with_name(f".{link.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    partial.rename(link)


def drop_dead_links(folder: Path) -> None:
    """Removes checkpoint-N links whose checkpoint was rotated away."""
    for link in folder.glob("checkpoint-*"):
        if link.is_symlink() and not link.exists():
            link.unlink()
