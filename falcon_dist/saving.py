"""When a run's state is written down: after steps where it is due, and for a survivor of a rank that died."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falcon_dist import checkpoint, host_memory, replicas, together, train_state
from falcon_dist.background import Copies, Job, Writer
from falcon_dist.contract import UserError
from falcon_dist.emergency import Updates
from falcon_dist.engine.named import NamedOptimizer
from falcon_dist.interval import Saved, advice
from falcon_dist.keeping import settle
from falcon_dist.layout import parse_size
from falcon_dist.monitor import Monitor, Point
from falcon_dist.run import Run, run_facts
from falcon_dist.team import Team
from falcon_dist.train_state import Kept

LAST_WAIT_S: Final = 60.0
ADVISED_AT: Final = 3
"""Saves after which it is told what they cost."""
MOST_OF_ROOM: Final = 0.5
"""The part of the memory that is left which copies may take."""


@dataclass(kw_only=True)
class Saver:
    """Writes the checkpoints of one rank."""

    run: Run
    team: Team
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    optimizer: NamedOptimizer
    monitor: Monitor
    updates: Updates
    refused: frozenset[int] = frozenset()
    """Steps whose checkpoints this run did not resume from, though they are newer."""
    saves: list[Saved] = field(default_factory=list)
    """How long training stood still for each save."""

    def __post_init__(self) -> None:
        self._copies = Copies()
        self._compared = 0
        # What all ranks agreed on; None: not yet. A survivor that is asked for the state writes it from where it is.
        self._beside_training: bool | None = None
        self._may_copy = True
        # Of the newest save, where training waited for its end: the writer knows of one under way only.
        self._fault: str | None = None
        self._writer = Writer(self.team)

    @property
    def can_save_alone(self) -> bool:
        """This rank has the whole state, and it changes only where ``updates`` sees it."""
        return self.run.strategy.steady and self._kept() is not None

    def save(self, step: int, makes_way: bool = False) -> None:
        """A checkpoint that is due; unless all must wait for it, it is written while training goes on.

        Where the run ``makes_way`` it is to be gone on with, which takes the optimizer's state too.
        """
        if makes_way:
            self._keep_state()
        with self.run.reporter.phase("save"):
            began = time.monotonic()
            self._writer.finish()
            self.meet()  # on rank 0 rotation belongs to it, which may take longer than a collective waits
            kept = self._kept()
            if kept is None:
                self._save_together(step)
            else:
                self._check_replicas(step, kept)
                self._begin(step, kept)
            self.saves.append(Saved(step=step, began_s=began, ended_s=time.monotonic()))
        if len(self.saves) == ADVISED_AT and (line := advice(self.saves, self.run.config.checkpoint.failure_hours)):
            self.run.reporter.line(line)

    def keep(self, step: int) -> None:
        """Links and rotation of a step that has its checkpoint: a survivor, or who was killed, left them undone."""
        if self.team.leads:
            self._tidy(step, tuple(self.monitor.points))
        self.meet()

    def check_replicas(self, step: int) -> None:
        """Compares all ranks' state where it is due.

        Raises:
            UnsoundError: they are not equal.
        """
        every = self.run.config.loop.check_replicas
        if every and step % every == 0 and (kept := self._kept()) is not None:
            self._check_replicas(step, kept)

    def _check_replicas(self, step: int, kept: Kept) -> None:
        """Also before a save, to which every rank gives a share: none of a state that differs is ever kept."""
        world_size = self.run.world.world_size
        if world_size > 1 and self._compared != step:
            tensors = dict(kept.tensors)
            if not kept.optimizer:  # what no checkpoint holds trains all the same
                tensors |= sorted(self.optimizer.named_state(train_state.parameter_names(self.model)).items())
            replicas.check_equal(tensors, self.team, world_size, step)
            self._compared = step

    def finish(self) -> None:
        """Waits for the save that is under way, and for the other ranks: they may hear of its end from rank 0.

        Raises:
            UserError: it failed, and no later one can make up for it.
        """
        with self.run.reporter.phase("save"):
            fault = self._writer.finish() or self._fault
            self.meet()
        if fault:
            raise UserError(
                f'checkpoint: cannot write in "{self.run.checkpoints}": {fault}; earlier checkpoints are untouched; '
                "make room and go on with --resume"
            )

    def finish_if_possible(self) -> None:
        """Where this rank ends for another reason: a save that all have a part in is not cut off."""
        with suppress(RuntimeError):
            self._writer.finish(LAST_WAIT_S)

    def save_last_finished(self) -> tuple[Path, int]:
        """The last finished step as a checkpoint, whatever the main thread does; its folder and step.

        Raises:
            UserError: it cannot be written, or its numbers are not finite.
        """
        self._keep_state()
        with self.updates.held() as step:
            path = self.run.checkpoints / checkpoint.folder_name(step)
            anew = step in self.refused
            if anew or checkpoint.fault_of(path) is not None or not checkpoint.holds_state(path):
                self._check_finite(step)
                with checkpoint.committed(self.run.checkpoints, step, self._facts(), anew=anew) as folder:
                    self.run.strategy.save(folder, self.model, self.tokenizer, self.optimizer)
                self.refused -= {step}
        return path, step

    def _keep_state(self) -> None:
        """What comes now is the last checkpoint of this attempt, which the next one goes on from."""
        if not self.run.strategy.keeps_state:
            self.run.strategy.keeps_state = True
            self._may_copy = False  # no copy of so much was reckoned with
            self._compared = 0  # the weights alone were

    def _kept(self) -> Kept | None:
        return self.run.strategy.kept(self.model, self.tokenizer, self.optimizer)

    def _facts(self) -> dict[str, object]:
        return {**run_facts(self.run), "evaluations": list(self.monitor.points)}

    def _begin(self, step: int, kept: Kept) -> None:
        config = self.run.config.checkpoint
        shards = kept.shards(writers=len(self.team.writers), max_bytes=parse_size(config.max_shard_size))
        mine = tuple(shard for shard in shards if self.team.writers[shard.writer] == self.team.rank)
        live = kept.tensors
        tensors = {name: live[name] for shard in mine for name in shard.tensors}
        if self._beside_training is None:
            self._beside_training = self._agreed_on_background(sum(tensor.nbytes for tensor in tensors.values()))
        copies = self._beside_training and self._may_copy
        job = Job(
            root=self.run.checkpoints,
            step=step,
            total_bytes=sum(tensor.nbytes for tensor in live.values()),
            shards=mine,
            tensors=self._copied(tensors) if copies else tensors,
            write_rest=partial(train_state.write_rest, kept=kept, shards=shards),
            facts=self._facts(),
            anew=step in self.refused,
        )
        self._writer.begin(job, partial(self._settle, step, tuple(self.monitor.points)))
        self._fault = None if copies else self._writer.finish()
        if not self._beside_training:
            self.meet()  # removing older ones may take rank 0 longer than a collective waits

    def meet(self) -> None:
        """Returns when all ranks have called it, however long their disks take."""
        self.team.meet(self.run.world.world_size)

    def _copied(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        try:
            return self._copies.take(tensors)
        except OSError as error:
            raise UserError(
                f"checkpoint: no memory for a copy to write from ({error.strerror}); set checkpoint.background=off"
            ) from error

    def _agreed_on_background(self, copied_bytes: int) -> bool:
        """Whether ranks write from a copy: all or none, for one that waited for its disk would be missed in a step."""
        asked = self.run.config.checkpoint.background
        if asked != "auto":
            return asked == "on"
        mine = "yes" if self._has_room_for(copied_bytes) else "no"
        return "no" not in self.team.everyone_says("save/background", mine, self.run.world.world_size)

    def _has_room_for(self, copied_bytes: int) -> bool:
        ranks = self.run.world.local_world_size
        return self.run.strategy.steady and ranks * copied_bytes < MOST_OF_ROOM * host_memory.room_bytes(ranks)

    def _settle(self, step: int, points: Sequence[Point], fault: str | None) -> None:
        """What follows a save, links and rotation on the rank that leads."""
        if fault is None:
            self.refused -= {step}  # it has been written anew
        if not self.team.leads:
            return
        if fault:
            self.run.reporter.line(
                f"checkpoint of step {step} was not written: {fault}; earlier ones are untouched, training goes on"
            )
            return
        self.run.reporter.checkpoint(self.run.checkpoints / checkpoint.folder_name(step), step)
        self._tidy(step, points)

    def _tidy(self, step: int, points: Sequence[Point]) -> None:
        """Links and rotation; where they fail the checkpoint is whole all the same, and the next save tries again."""
        config = self.run.config
        try:
            settle(
                self.run.checkpoints,
                step,
                config.checkpoint,
                points,
                min_gain=config.evaluate.min_gain,
                refused=self.refused,
            )
        except (UserError, OSError) as error:
            self.run.reporter.line(
                f"checkpoint of step {step} is whole, but links and rotation after it failed: {error}; "
                "older checkpoints are left, the next save tries again"
            )

    def _save_together(self, step: int) -> None:
        """Rank 0 commits; the others give what is theirs."""
        run, of_model = self.run, (self.model, self.tokenizer, self.optimizer)
        self._fault = together.save(
            self.team,
            run.checkpoints / checkpoint.folder_name(step),
            {"step": step, **self._facts()},
            total_bytes=run.strategy.saved_bytes(*of_model),
            give=lambda folder: run.strategy.save(folder, *of_model, meet=self.meet),
            anew=step in self.refused,
        )
        self._settle(step, tuple(self.monitor.points), self._fault)
        self.meet()

    def _check_finite(self, step: int) -> None:
        """The loop looks at loss and gradients of a step after its update, where this step may never have come to."""
        for name, param in self.model.named_parameters():
            if not torch.isfinite(param).all():
                raise UserError(f'checkpoint: "{name}" is not finite after step {step}; it is not saved')
