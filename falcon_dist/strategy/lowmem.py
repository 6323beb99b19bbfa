"""Full fine-tuning in little memory: each weight is stepped inside backward and its gradient freed at once.

The way of LOMO (Lv and others 2023, arXiv:2306.09782), with Adafactor's update in the place of plain descent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from falcon_dist.config import StrategyName, TrainConfig
from falcon_dist.contract import UnsoundError, UserError
from falcon_dist.engine.adafactor import Adafactor
from falcon_dist.engine.adamw import decayed_groups
from falcon_dist.order import Schedule
from falcon_dist.strategy.replicated import Replicated
from falcon_dist.world import World


class FullLowMemory(Replicated):
    """strategy="full-lowmem": every rank holds all weights in bf16, no whole gradient and no master copy.

    A weight that is used twice (a tied embedding) gets its gradient, and its step, when backward is at its first use:
    last. Ranks average each gradient when it is there, in backward's order, which is the same on all of them.
    """

    name: StrategyName = "full-lowmem"
    steady = False

    def __init__(self, config: TrainConfig, world: World) -> None:
        super().__init__(config, world)
        self._schedule: Schedule | None = None

    def check(self, schedule: Schedule) -> None:
        self._schedule = schedule
        if schedule.grad_accum > 1:
            raise UserError(
                f'loop: strategy "full-lowmem" frees each gradient at once and cannot accumulate {schedule.grad_accum} '
                f"micro-batches; set loop.micro_batch={schedule.micro_batch * schedule.grad_accum} and "
                "loop.grad_accum=1, or use more ranks"
            )

    def make_optimizer(self, model: PreTrainedModel) -> Adafactor:
        """Adafactor, hooked to every parameter: its gradient is taken as soon as it is whole.

        Within backward UnsoundError is raised where a gradient is not finite; that weight is as it was.
        """
        optim = self.config.optim
        optimizer = Adafactor(
            decayed_groups(model.named_parameters(), optim.weight_decay),
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.max_grad_norm,
            seed=self.config.seed,
            agree=self._agree,
        )
        names = {param: name for name, param in model.named_parameters()}

        def take(param: Tensor) -> None:
            grad, param.grad = param.grad, None
            assert grad is not None
            self._average(grad)
            try:
                optimizer.step_one(param, grad)
            except FloatingPointError as error:
                raise UnsoundError(f"{names[param]}: {error} {self._place(optimizer.steps + 1)}") from error

        for param in names:
            param.register_post_accumulate_grad_hook(take)
        return optimizer

    def _place(self, step: int) -> str:
        """Which step it is, from 1, and the rows in it; of the ranks' average nobody can tell whose rows they were."""
        ranks = range(self.world.world_size)
        rows = [f"rank {r} had rows {self._schedule.rows_of_rank(step - 1, r)}" for r in ranks if self._schedule]
        return f"at step {step}: {'' if len(ranks) == 1 else 'averaged over all ranks; '}{'; '.join(rows)}"

    def _average(self, grad: Tensor) -> None:
        if self.world.world_size > 1:
            dist.all_reduce(grad)
            grad.div_(self.world.world_size)

    def _agree(self, tensors: Sequence[Tensor]) -> None:
        """Makes fp32 tensors those of rank 0; called for every weight, as ``_average``."""
        if self.world.world_size > 1:
            told = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.broadcast(told, src=0)
            for tensor, part in zip(tensors, told.split([tensor.numel() for tensor in tensors]), strict=True):  # type: ignore[no-untyped-call]
                tensor.copy_(part.view_as(tensor))

    @property
    def wraps(self) -> bool:
        """Never in DDP, whose buckets hold every gradient whole."""
        return False

    def settings(self) -> dict[str, Any]:
        """Clipping is done for each weight by itself, where its gradient is."""
        return {"max_grad_norm": 0.0, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
