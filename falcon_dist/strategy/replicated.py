"""Plain data parallelism, and the seam every strategy fills: what is trained, by which optimizer, how it is kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falcon_dist import train_state
from falcon_dist.config import StrategyName, TrainConfig
from falcon_dist.engine.adamw import MasterAdamW, decayed_groups
from falcon_dist.engine.form import FAMILIES
from falcon_dist.engine.named import NamedOptimizer
from falcon_dist.layout import parse_size
from falcon_dist.order import Schedule
from falcon_dist.train_state import Kept
from falcon_dist.world import World


class Replicated:
    """strategy="ddp": every rank holds all weights and the whole optimizer; gradients are averaged by DDP.

    The other strategies change what differs. Called in this order: check, ready, make_optimizer, then load where
    a run is resumed, settings, begin, and save and whole as often as is due.
    """

    name: StrategyName = "ddp"
    steady: bool = True
    """Weights and state change within ``optimizer.step()`` and nowhere else."""

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.keeps_state = config.checkpoint.optimizer
        """The next checkpoint holds the optimizer's state."""
        self.get_on: Callable[[], None] = lambda: None
        """Called when a part of a long reading is done: a sign for the ranks that wait."""
        self._all_used = True

    def check(self, schedule: Schedule) -> None:
        """Raises UserError for settings that this strategy cannot follow."""

    def ready(self, model: PreTrainedModel) -> None:
        """Makes of a loaded model what is trained.

        Raises:
            UserError: the model does not have what the settings name.
        """
        self._all_used = model.config.model_type in FAMILIES

    def make_optimizer(self, model: PreTrainedModel) -> NamedOptimizer:
        """The optimizer of what is trained."""
        trained = ((name, param) for name, param in model.named_parameters() if param.requires_grad)
        optim = self.config.optim
        return MasterAdamW(
            decayed_groups(trained, optim.weight_decay), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps
        )

    def settings(self) -> dict[str, Any]:
        """Fields of SFTConfig that are not as plain data parallelism has them.

        A model of another family may have what text alone never uses, as the eyes of one that also sees: DDP would wait
        for its gradients, and average none of the others.
        """
        return {} if self._all_used else {"ddp_find_unused_parameters": True}

    @property
    def wraps(self) -> bool:
        """The trainer wraps the model: a rank alone has nothing to average, and DDP's buckets are gradients again."""
        return self.world.world_size > 1

    def begin(self, wrapped: torch.nn.Module) -> None:
        """The trainer has prepared the model and is about to take the first step.

        Raises:
            RuntimeError: it is not wrapped as the world that was launched needs it.
        """
        if self.wraps != isinstance(wrapped, DistributedDataParallel):
            raise RuntimeError(f"DistributedDataParallel around the model: {self.wraps}, not {type(wrapped).__name__}")

    def whole(self) -> AbstractContextManager[None]:
        """In the block the model itself, without what wraps it, has all its weights on every rank."""
        return nullcontext()

    def kept(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, optimizer: NamedOptimizer
    ) -> Kept | None:
        """What a checkpoint holds; None: no rank has all of it, and ``save`` writes it while all wait."""
        return Kept(
            weights=train_state.named_weights(model),
            optimizer=self.kept_state(model, optimizer),
            steps=optimizer.steps,
            describe=partial(train_state.describe_model, model, tokenizer),
        )

    def kept_state(self, model: PreTrainedModel, optimizer: NamedOptimizer) -> dict[str, torch.Tensor]:
        """The optimizer's state, where it is kept, in an order that no run depends on."""
        if not self.keeps_state:
            return {}
        return dict(sorted(optimizer.named_state(train_state.parameter_names(model)).items()))

    def saved_bytes(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, optimizer: NamedOptimizer) -> int:
        """Bytes of all tensors that ``save`` writes."""
        kept = self.kept(model, tokenizer, optimizer)
        assert kept is not None
        return sum(tensor.nbytes for tensor in kept.tensors.values())

    def save(
        self,
        folder: Path | None,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: NamedOptimizer,
        meet: Callable[[], None] | None = None,
    ) -> None:
        """Writes weights and state into ``folder``; called on every rank, only rank 0 has a folder.

        ``meet`` returns when all ranks have called it: to wait for rank 0's disk longer than a collective may take.

        Raises:
            OSError: rank 0 cannot write; it has taken part in all that the others take part in.
        """
        kept = self.kept(model, tokenizer, optimizer)
        if folder is None or kept is None:
            return
        shards = kept.shards(writers=1, max_bytes=parse_size(self.config.checkpoint.max_shard_size))
        train_state.write_shards(folder, shards, kept.tensors)
        train_state.write_rest(folder, kept, shards)

    def load(
        self, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, optimizer: NamedOptimizer
    ) -> None:
        """Takes what ``save`` wrote, bit for bit.

        Raises:
            DamagedError: bytes are not what was written.
            UserError: the state is not there.
        """
        kept = self.kept(model, tokenizer, optimizer)
        assert kept is not None
        state, steps = train_state.load(folder, kept, self.get_on)
        optimizer.load_named_state(train_state.parameter_names(model), state, steps)
