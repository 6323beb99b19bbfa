"""Plain data parallelism, and the seam every strategy fills: what is trained, by which optimizer, how it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falcon_dist import train_state
from falcon_dist.config import StrategyName, TrainConfig
from falcon_dist.engine.adamw import MasterAdamW, decayed_groups
from falcon_dist.engine.named import NamedOptimizer
from falcon_dist.order import Schedule
from falcon_dist.world import World


class Replicated:
    """strategy="ddp": every rank holds all weights and the whole optimizer; gradients are averaged by DDP.

    The other strategies change what differs. Called in this order: check, ready, make_optimizer, then load where
    a run is resumed, settings, check_wrapped, and save as often as is due.
    """

    name: StrategyName = "ddp"

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        self.world = world

    def check(self, schedule: Schedule) -> None:
        """Raises UserError for settings that this strategy cannot follow."""

    def ready(self, model: PreTrainedModel) -> None:
        """Makes of a loaded model what is trained.

        Raises:
            UserError: the model does not have what the settings name.
        """

    def make_optimizer(self, model: PreTrainedModel) -> NamedOptimizer:
        """The optimizer of what is trained."""
        trained = ((name, param) for name, param in model.named_parameters() if param.requires_grad)
        optim = self.config.optim
        return MasterAdamW(
            decayed_groups(trained, optim.weight_decay), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps
        )

    def settings(self) -> dict[str, Any]:
        """Fields of SFTConfig that are not as plain data parallelism has them."""
        return {}

    def check_wrapped(self, model: torch.nn.Module) -> None:
        """Raises RuntimeError where the trainer did not wrap the model for the world that was launched."""
        if self.world.world_size > 1 and not isinstance(model, DistributedDataParallel):
            raise RuntimeError(
                f"the trainer was to wrap the model in DistributedDataParallel, not {type(model).__name__}"
            )

    def save(
        self,
        folder: Path | None,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: NamedOptimizer,
    ) -> None:
        """Writes weights and state into ``folder``; called on every rank, only rank 0 has a folder."""
        if folder is None:
            return
        train_state.save_weights(folder, model, tokenizer, self.config.checkpoint.max_shard_size)
        if self.config.checkpoint.optimizer:
            train_state.save_optimizer(folder, model, optimizer)

    def load(self, folder: Path, model: PreTrainedModel, optimizer: NamedOptimizer) -> None:
        """Takes what ``save`` wrote, bit for bit.

        Raises:
            UserError: the state is not there.
        """
        train_state.load_weights(folder, model)
        train_state.load_optimizer(folder, model, optimizer)
