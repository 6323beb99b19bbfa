"""SFTTrainer fitted to packed rows through its public hooks: rows, loss, schedule, what is told after each step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from falcon_dist.config import TrainConfig
from falcon_dist.engine.adafactor import Adafactor
from falcon_dist.engine.adamw import MasterAdamW
from falcon_dist.engine.form import TrainingForm
from falcon_dist.engine.peak import Gauge
from falcon_dist.masking import Masking
from falcon_dist.metrics import Reporter, StepRecord
from falcon_dist.monitor import Verdict
from falcon_dist.order import Schedule
from falcon_dist.pace import Pace
from falcon_dist.rows import Part
from falcon_dist.soundness import Soundness, gradient_norm, norm_of
from falcon_dist.step_clock import StepClock, watch_buckets
from falcon_dist.world import World

Optimizers = tuple[Optimizer, LambdaLR]


class PackedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with one loss of ours: summed over the rows' own labels, divided by all ranks' labels.

    Every part of a step is timed, and numbers that are not finite go no further.
    """

    def __init__(
        self, *, form: TrainingForm, clock: StepClock, soundness: Soundness, optimizers: Optimizers, **kwargs: Any
    ) -> None:
        declared = kwargs["model"].config.get_text_config()
        of_experts = getattr(declared, "router_aux_loss_coef", None)
        super().__init__(optimizers=optimizers, **kwargs)
        if of_experts is not None:  # TRL writes what it was told over it, and a checkpoint would keep that
            declared.router_aux_loss_coef = of_experts
        self._given = optimizers
        self.form = form
        self._clock = clock
        self._soundness = soundness
        self._watched = False
        self._micro_batches: list[tuple[dict[str, torch.Tensor], torch.Tensor, float]] = []

    def leave_unwrapped(self) -> None:
        """Nothing goes around the model; accelerate's autocast, where it is asked for, goes on its forward as ever."""
        self.accelerator.prepare_model(self.model, device_placement=False, evaluation_mode=True)

    def create_optimizer(self, *args: Any) -> Optimizer:
        """The one that was given, which the Trainer forgets when it hands over to DeepSpeed."""
        self.optimizer = optimizer = self._given[0]
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> LambdaLR:
        """Likewise."""
        self.lr_scheduler = scheduler = self._given[1]
        return scheduler

    def get_batch_samples(self, *args: Any) -> Any:
        """Rows come from the collator, timed by itself; then ranks tell each other how many labels they have."""
        self._micro_batches.clear()
        with self._clock.part("communicate", without="load"):
            return super().get_batch_samples(*args)

    def training_step(self, model: torch.nn.Module, *args: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch."""
        if isinstance(model, DistributedDataParallel) and not self._watched:
            watch_buckets(model, self._clock)
            self._watched = True
        with self._clock.backward():
            return super().training_step(model, *args)  # type: ignore[no-any-return]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean loss a token of the global batch, times world_size because DDP averages gradients over ranks."""
        assert not return_outputs
        assert num_items_in_batch is not None
        factor = self.args.world_size / max(1, int(num_items_in_batch))
        labels = inputs.pop("labels")
        self._micro_batches.append((inputs, labels, factor))
        with self._clock.part("forward"):
            loss = self.form.loss(model, inputs, labels, factor)
        self._soundness.check_loss(loss)
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Norm before clipping; our optimizer clips as it reads the gradients, without a pass of its own."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, MasterAdamW):
            with self._clock.part("optimize"):
                norm = gradient_norm(list(model.parameters()))
            with self._clock.part("communicate"):
                norm = self._soundness.agreed(norm)
            optimizer.clip(float(norm), self.args.max_grad_norm)
        else:
            norm = torch.as_tensor(super()._clip_grad_norm(model))
        self._soundness.check_norm(float(norm), self._replay)
        return norm

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> float | torch.Tensor:
        """Of gradients that are gone by now: what their optimizer has added up."""
        if isinstance(optimizer := self._given[0], Adafactor):
            return optimizer.norm
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-any-return]

    def _replay(self) -> bool:
        """This step's gradients again, of this rank alone: are they finite?"""
        trained = [param for param in self.model.parameters() if param.requires_grad]
        losses = (self.form.loss(self.model, *given) for given in self._micro_batches)
        # Not by backward, which would have them summed over ranks again.
        found = (torch.autograd.grad(loss, trained, allow_unused=True) for loss in losses)
        return all(math.isfinite(norm_of([grad for grad in grads if grad is not None])) for grads in found)


class RowCollator:
    """Row numbers -> the batch a model takes; remembers which rows it gave."""

    def __init__(self, part: Part, masking: Masking, clock: StepClock) -> None:
        self.part = part
        self._masking = masking
        self._clock = clock
        self._given: list[int] = []

    def __call__(self, examples: list[dict[str, int]]) -> dict[str, torch.Tensor]:
        rows = [int(example["row"]) for example in examples]
        self._given += rows
        with self._clock.part("load"):
            batch = self.part.batch(rows)
            return {**batch, **self._masking.inputs(batch.pop("records"))}

    def take(self, count: int) -> list[int]:
        """The oldest ``count`` rows not yet taken; later ones were fetched ahead of their step."""
        taken, self._given = self._given[:count], self._given[count:]
        return taken


class StepCallback(TrainerCallback):  # type: ignore[misc]
    """After each step: checks the rows against the plan, reports, and saves where it is due."""

    def __init__(
        self,
        *,
        config: TrainConfig,
        schedule: Schedule,
        world: World,
        start: int,
        collator: RowCollator,
        clock: StepClock,
        gauge: Gauge,
        soundness: Soundness,
        reporter: Reporter,
        pace: Pace,
        begin: Callable[[], None],
        finished: Callable[[int], None],
        save: Callable[[int, bool], None],
        evaluate: Callable[[int], Verdict],
        asked_to_stop: Callable[[], bool],
    ) -> None:
        self._config = config
        self._schedule = schedule
        self._world = world
        self._start = start
        self._collator = collator
        self._clock = clock
        self._gauge = gauge
        self._soundness = soundness
        self._reporter = reporter
        self._pace = pace
        self._begin = begin
        self._finished = finished
        self._save = save
        self._evaluate = evaluate
        self._asked_to_stop = asked_to_stop
        self._began = self._step_began = self._mark = time.perf_counter()
        self.last_step = start

    def on_step_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seeds by step and rank: dropout is the same again after a resume, with no generator state to keep."""
        step = self._start + state.global_step
        torch.manual_seed((self._config.seed * 1_000_003 + step) * self._world.world_size + self._world.rank)
        self._soundness.step = step + 1

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The first step begins here, the others when all that follows a step is done."""
        self._begin()
        self._began = self._step_began = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gradients are clipped and the optimizer is about to step."""
        self._mark = self._clock.now()

    def on_optimizer_step(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        self._clock.add("optimize", self._clock.now() - self._mark)

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Until on_log, ranks tell each other their losses."""
        self._mark = self._clock.now()

    def on_log(
        self,
        args: SFTConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Called once a step (logging_steps=1) and once more at the end, then without a loss."""
        if logs is None or "loss" not in logs:
            return
        self._clock.add("communicate", self._clock.now() - self._mark)
        step = self._start + state.global_step
        rows = self._check_rows(step)
        self._report(step, logs, rows)
        self.last_step = step
        self._finished(step)
        every, verdict = self._config.checkpoint.every, self._evaluate(step)
        leave = self._asked_to_stop()
        keep = verdict.stop or leave or (verdict.save and self._config.checkpoint.keep_best)
        if keep or step == self._schedule.total_steps or (every and step % every == 0):
            self._save(step, leave and step < self._schedule.total_steps)
        control.should_training_stop |= verdict.stop or leave
        self._step_began = time.perf_counter()

    def _check_rows(self, step: int) -> list[int]:
        planned = self._schedule.rows_of_rank(step - 1, self._world.rank)
        rows = self._collator.take(len(planned))
        if rows != planned:
            raise RuntimeError(f"step {step} trained rows {rows}, planned were {planned}")
        return rows

    def _report(self, step: int, logs: dict[str, float], rows: list[int]) -> None:
        now = time.perf_counter()
        total, seconds = self._schedule.total_steps, now - self._step_began
        tokens = self._collator.part.count_tokens(self._schedule.rows_of_step(step - 1))
        spent = self._pace.spent
        record = StepRecord(
            step=step,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            epoch=round(self._schedule.epoch_at(step), 4),
            tokens=tokens,
            seconds=seconds,
            rows=rows,
            parts=self._clock.take(),
            gemm_share=round(self._gauge.share(tokens / self._world.world_size, seconds), 4),
            busy_s=spent and round(spent.busy_s, 4),
            waited_s=spent and round(spent.waited_s, 4),
        )
        eta = (now - self._began) / (step - self._start) * (total - step)
        every = self._config.report.log_every
        self._reporter.step(record, total=total, eta_s=eta, log=step == total or bool(every and step % every == 0))
