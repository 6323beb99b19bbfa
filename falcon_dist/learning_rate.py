"""The learning rate of each step: warm-up, then a schedule down to nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from falcon_dist.config import OptimConfig
from falcon_dist.order import Schedule


def learning_rate_factor(config: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Step (from 0) -> share of the peak learning rate: linear warm-up, then the schedule down to 0 at the end."""
    warmup = max(config.warmup_steps, math.ceil(config.warmup_share * total_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, total_steps - warmup)
        if config.schedule == "linear":
            return max(0.0, 1.0 - done)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done))) if config.schedule == "cosine" else 1.0

    return factor


def make_scheduler(optimizer: Optimizer, config: OptimConfig, schedule: Schedule, start: int) -> LambdaLR:
    """The schedule as seen from step ``start``: it depends on the step alone, so nothing of it must be kept."""
    factor = learning_rate_factor(config, schedule.total_steps)
    return LambdaLR(optimizer, lambda step: factor(start + step))
