"""The strategy that a configuration asks for."""

from __future__ import annotations

from falcon_dist.config import TrainConfig
from falcon_dist.strategy.lora import Lora
from falcon_dist.strategy.lowmem import FullLowMemory
from falcon_dist.strategy.replicated import Replicated
from falcon_dist.strategy.zero import Zero1, Zero2, Zero3
from falcon_dist.world import World

_STRATEGIES: tuple[type[Replicated], ...] = (Replicated, Lora, FullLowMemory, Zero1, Zero2, Zero3)


def make_strategy(config: TrainConfig, world: World) -> Replicated:
    """By ``config.strategy``."""
    return next(kind for kind in _STRATEGIES if kind.name == config.strategy)(config, world)
