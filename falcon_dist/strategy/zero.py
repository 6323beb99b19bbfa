"""ZeRO by DeepSpeed: what every rank of plain data parallelism holds whole is divided over the ranks.

Rajbhandari and others 2020, arXiv:1910.02054. Checkpoints are those of plain data parallelism: each tensor is gathered
when it is written, so nothing in them tells how many ranks there were.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falcon_dist import train_state
from falcon_dist.agreement import check_zero_settings
from falcon_dist.config import StrategyName, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.adamw import decayed_groups
from falcon_dist.engine.named import NamedOptimizer
from falcon_dist.layout import Shard, parse_size
from falcon_dist.order import Schedule
from falcon_dist.strategy.partitions import MASTER, MOMENTS, PartitionedAdamW, whole
from falcon_dist.strategy.replicated import Replicated
from falcon_dist.train_state import Kept
from falcon_dist.world import World

BUCKET: Final = 25_000_000
"""Elements that are summed or gathered in one collective."""
SMALL: Final = 10_000
"""Parameters of at most so many elements stay whole on every rank (zero3): norms and biases."""

MEETING: Final = 256 << 20
"""Bytes that rank 0 writes until the others wait for it anew: few enough for any disk in the time of a collective."""

STAGES: Final[dict[StrategyName, int]] = {"zero1": 1, "zero2": 2, "zero3": 3}


class Zero1(Replicated):
    """strategy="zero1": each rank holds its part of fp32 master weights and moments, and steps that part."""

    name: StrategyName = "zero1"
    steady = False

    def __init__(self, config: TrainConfig, world: World) -> None:
        super().__init__(config, world)
        self._engine: Any = None
        self._resumed: Path | None = None
        self._weights: dict[str, Tensor] = {}
        self._trained: dict[Tensor, str] = {}

    def check(self, schedule: Schedule) -> None:
        check_zero(self.config)

    def ready(self, model: PreTrainedModel) -> None:
        """Notes what there is: later a weight may be a part of itself, or of one tensor with all others."""
        self._weights = {
            name: torch.empty_like(t, device="meta") for name, t in train_state.named_weights(model).items()
        }
        self._trained = train_state.parameter_names(model)

    def make_optimizer(self, model: PreTrainedModel) -> PartitionedAdamW:
        _open_deepspeed()
        optim = self.config.optim
        return PartitionedAdamW(
            decayed_groups(model.named_parameters(), optim.weight_decay),
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            fused=True,
        )

    def settings(self) -> dict[str, Any]:
        """DeepSpeed clips: the Trainer only tells it the norm to clip to."""
        return {"deepspeed": deepspeed_settings(STAGES[self.name]), "bf16": self.config.precision == "bf16"}

    @property
    def wraps(self) -> bool:
        """DeepSpeed does, on one rank too."""
        return True

    def begin(self, wrapped: nn.Module) -> None:
        from deepspeed import DeepSpeedEngine

        if not isinstance(wrapped, DeepSpeedEngine):
            raise RuntimeError(f"the trainer was to wrap the model in DeepSpeedEngine, not {type(wrapped).__name__}")  # noqa: TRY004
        self._engine = wrapped
        optimizer: PartitionedAdamW = wrapped.optimizer.optimizer
        steps = train_state.optimizer_steps(self._resumed) if self._resumed else 0
        optimizer.begin_at(wrapped.optimizer, steps)
        for part in train_state.optimizer_parts(self._resumed, self.get_on) if self._resumed else ():
            optimizer.load_named_state(self._trained, part, steps)

    def kept(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, optimizer: NamedOptimizer) -> None:
        return None

    def save(
        self,
        folder: Path | None,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: NamedOptimizer,
        meet: Callable[[], None] | None = None,
    ) -> None:
        """Rank 0 writes one tensor after the other, of which all ranks give their parts."""
        kept = self._described(model, tokenizer, optimizer)
        shards = kept.shards(writers=1, max_bytes=parse_size(self.config.checkpoint.max_shard_size))
        left = _in_order(shards, kept.tensors, meet or (lambda: None))
        live = self._live(model)
        try:
            if folder is not None:
                # Gathers in the order of ``left``, as the others do.
                train_state.write_shards(folder, shards, kept.tensors, lambda _: whole(live, next(left)))
        except OSError:
            _gather_rest(live, left)
            raise
        _gather_rest(live, left)
        if folder is not None:
            train_state.write_rest(folder, kept, shards)

    def saved_bytes(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, optimizer: NamedOptimizer) -> int:
        return sum(tensor.nbytes for tensor in self._described(model, tokenizer, optimizer).tensors.values())

    def _described(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, optimizer: NamedOptimizer) -> Kept:
        """What a checkpoint holds, without any values."""
        assert isinstance(optimizer, PartitionedAdamW)
        return Kept(
            weights=self._weights,
            optimizer=self._state_shapes(),
            steps=optimizer.updates,
            describe=partial(train_state.describe_model, model, tokenizer),
        )

    def load(
        self, folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, optimizer: NamedOptimizer
    ) -> None:
        """Takes the weights; the state is taken when DeepSpeed has divided it."""
        train_state.optimizer_steps(folder)
        for _ in train_state.optimizer_parts(folder, self.get_on):
            pass  # read to see whether it is what was written, while an older checkpoint can still be taken
        weights = train_state.named_weights(model)
        kept = Kept(weights=weights, optimizer={}, steps=0, describe=lambda _: None)
        train_state.fill(folder, kept, self.get_on)
        self._resumed = folder

    def _state_shapes(self) -> Mapping[str, Tensor]:
        if not self.keeps_state:
            return {}
        kinds = (MASTER, *MOMENTS) if self.config.precision == "bf16" else MOMENTS
        shapes = {name: self._weights[name].shape for name in self._trained.values()}
        return {
            f"{kind}/{name}": torch.empty(shape, dtype=torch.float32, device="meta")
            for kind in sorted(kinds)
            for name, shape in sorted(shapes.items())
        }

    @staticmethod
    def _live(model: PreTrainedModel) -> dict[str, Tensor]:
        return {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}


class Zero2(Zero1):
    """strategy="zero2": besides, each rank keeps only its part of the averaged gradients."""

    name: StrategyName = "zero2"


class Zero3(Zero1):
    """strategy="zero3": besides, each rank holds its part of the weights, gathered while a layer is at work."""

    name: StrategyName = "zero3"

    def ready(self, model: PreTrainedModel) -> None:
        """Falcon's layers multiply by a view of their weight, which autograd would keep whole until backward.

        DeepSpeed has made ``torch.nn.functional.linear`` such that it does not; the plain layer goes by that.
        """
        super().ready(model)
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
                layer.forward = MethodType(nn.Linear.forward, layer)  # type: ignore[method-assign]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Gathers all weights; DeepSpeed's hooks, which divide them again after each layer, are off."""
        if self._engine is None:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters
        from trl.models.utils import add_hooks, remove_hooks

        with GatheredParameters(list(self._trained)):
            remove_hooks(self._engine)
            try:
                yield
            finally:
                add_hooks(self._engine)


def _in_order(shards: Iterable[Shard], tensors: Mapping[str, Tensor], meet: Callable[[], None]) -> Iterator[str]:
    """The names of all tensors; before the next one all ranks meet where rank 0 has written much, or a file's end."""
    for shard in shards:
        written = MEETING
        for name in shard.tensors:
            if written >= MEETING:
                meet()
                written = 0
            yield name
            written += tensors[name].nbytes


def _gather_rest(live: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Takes part in gathers whose result is not wanted here: each needs all ranks."""
    for name in names:
        whole(live, name)


def check_zero(config: TrainConfig) -> None:
    """Raises UserError for settings that no stage can follow, or where DeepSpeed is not installed."""
    check_zero_settings(config)
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f'strategy "{config.strategy}" needs DeepSpeed, which is not installed here: '
            'pip install "falcon-dist[deepspeed]"'
        )


def rank_bytes(
    stage: int, *, parameters: int, largest: int, each: int, world_size: int, evaluates: bool
) -> dict[str, int]:
    """The most that one rank holds of weights, gradients and optimizer, and what it needs beside them.

    Args:
        stage: 1, 2 or 3.
        parameters: of the model.
        largest: elements of its largest parameter.
        each: bytes of a weight.
        world_size: ranks that share.
        evaluates: the model is run for other than training, for which its weights are gathered.
    """
    held, share = each * parameters, -(-parameters // world_size)
    bucket = each * min(BUCKET, parameters)
    gathered = held if evaluates else min(held, 2 * bucket + each * largest)
    found = {
        "weights": held if stage < 3 else each * share + gathered,
        "gradients": held if stage < 2 else each * share,
        "optimizer": 12 * share,
    }
    # Gradients become fp32 for the update; before the first one stand weights as loaded, flat and divided.
    update = (each + 4) * (share if stage < 3 else min(share, BUCKET + largest))
    loading = held * (2 if stage < 3 else 1) + (each + 4) * share
    return {**found, "working": 4 * bucket + max(update, loading - sum(found.values()))}


def deepspeed_settings(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration; "auto" is what the Trainer fills in from its own."""
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    division = {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "sub_group_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": BUCKET,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": SMALL,
    }
    return {
        **dict.fromkeys(auto, "auto"),
        "bf16": {"enabled": "auto"},
        "zero_optimization": division,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _open_deepspeed() -> None:
    """Settles before its first use that DeepSpeed runs on the CPU and compiles nothing."""
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    set_accelerator(CPU_Accelerator())
    # An all_reduce of its own for inference; compiling it takes minutes, and a rank that is killed meanwhile leaves a
    # lock at which every later run waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
