"""Bytes that a rank and a host will need at most, told before anything is loaded, and what would fit instead.

Weights, gradients and optimizer follow from the parameters' shapes. What forward keeps for backward is counted by
sending a batch through the model on the meta device, where tensors have shapes but no memory. Autocast, which passes by
that device, is followed with fake tensors of the CPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from falcon_dist.agreement import check_agreement
from falcon_dist.config import Precision, StrategyName, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.adafactor import state_shapes
from falcon_dist.engine.attention import register
from falcon_dist.engine.form import Choice, choose
from falcon_dist.engine.fused import FusedParts
from falcon_dist.engine.head import CHUNK_BYTES
from falcon_dist.engine.native import WEIGHT_DTYPES
from falcon_dist.engine.widened import kept_bytes
from falcon_dist.masking import Masking
from falcon_dist.monitor import evaluates
from falcon_dist.strategy.held_out import held_out_bytes
from falcon_dist.strategy.lora import trained_parameters
from falcon_dist.strategy.zero import STAGES, check_zero, rank_bytes

GIB: Final = 1 << 30
PROGRAM_BYTES: Final = 720 << 20
"""Python with torch, transformers and trl, 560 MiB before a model is loaded, and what threads and allocator keep."""
SPARE: Final = 0.03
"""Share of a host that the system itself keeps."""
_WEIGHT_BYTES: dict[Precision, int] = {"bf16": 2, "bf16-autocast": 4, "fp32": 4}
NEAREST: Final[tuple[StrategyName, ...]] = ("ddp", "zero1", "zero2", "zero3", "full-lowmem", "lora")
"""From the one that changes training least to the one that needs least."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """The most that one rank holds at once, in bytes."""

    mapped: int = 0
    """Weights that are never written: pages of their files, there once for all ranks of a host."""
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """What forward keeps for backward."""
    working: int = 0
    """What single operations need on top: logits, the widest layer's gradients, an optimizer's copy."""
    snapshot: int = 0
    """This rank's share of the copy that a checkpoint is written from while training goes on; see ``on_host_of``."""
    program: int = PROGRAM_BYTES

    @property
    def total(self) -> int:
        """Resident memory of one rank."""
        return self.mapped + self.own

    @property
    def own(self) -> int:
        """Without what it shares with its host's other ranks."""
        state = self.weights + self.gradients + self.optimizer + self.snapshot
        return state + self.activations + self.working + self.program

    def on_host(self, ranks: int) -> int:
        """Bytes that ``ranks`` of these need together."""
        return self.mapped + ranks * self.own

    def text(self) -> str:
        """ "3.10 GiB = weights 0.25 + ..." with the parts that are not nothing."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        told = " + ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items() if value >= GIB // 200)
        return f"{self.total / GIB:.2f} GiB = {told}"


def meta_model(plan: PreTrainedConfig, choice: Choice) -> PreTrainedModel:
    """A model of this architecture with the attention it trains with; it takes no memory."""
    register()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plan, attn_implementation=choice.attention)
    model.train()
    return model


def predict(config: TrainConfig, plan: PreTrainedConfig, world_size: int) -> RankMemory:
    """What one rank of this run will hold, where a host has room for it all."""
    choice = choose(plan, config.model, config.engine, config.strategy)
    model = meta_model(plan, choice).to(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    params = list(model.parameters())
    each = _WEIGHT_BYTES[config.precision]
    weights = sum(param.numel() for param in params) * each
    widened = _widened_bytes(config, params)
    working = _head_bytes(config, model, choice) + _widest_bytes(config, model, choice) + widened
    adapters = trained_parameters(model, config.lora) if config.strategy == "lora" else 0
    kept = _kept_bytes(config, model, choice)
    # What forward keeps is gone when held-out rows are measured, whose logits are never in chunks.
    aside = held_out_bytes(config, model, choice.plain_attention) + widened - kept
    common = {"activations": kept, "working": max(working, aside)}
    if config.strategy == "lora":
        state = adapters * (12 if each == 2 else 8)
        grads = adapters * each * (2 if world_size > 1 else 1)
        own = dataclasses.replace(_mapped(config, plan, weights), gradients=grads, optimizer=state)
        copied = _copied(config, adapters * each, state, world_size)
        return dataclasses.replace(own, weights=own.weights + adapters * each, snapshot=copied, **common)
    if config.strategy == "full-lowmem":
        state = _factored(params)
        copied = _copied(config, weights, state, world_size)
        gradients = _at_once(params, tied=plan.tie_word_embeddings)
        return RankMemory(weights=weights, gradients=gradients, optimizer=state, snapshot=copied, **common)
    if config.strategy in STAGES:
        return _divided(config, params, world_size, **common)
    optimizer = sum(param.numel() for param in params) * (12 if each == 2 else 8)
    common["working"] = max(working, 4 * max(param.numel() for param in params), aside - weights)  # nor gradients then
    gradients = weights * (2 if world_size > 1 else 1)
    copied = _copied(config, weights, optimizer, world_size)
    return RankMemory(weights=weights, gradients=gradients, optimizer=optimizer, snapshot=copied, **common)


def _divided(config: TrainConfig, params: list[Tensor], world_size: int, activations: int, working: int) -> RankMemory:
    sizes = [param.numel() for param in params]
    parts = rank_bytes(
        STAGES[config.strategy],
        parameters=sum(sizes),
        largest=max(sizes),
        each=_WEIGHT_BYTES[config.precision],
        world_size=world_size,
        evaluates=evaluates(config),
    )
    # What forward kept is free when the optimizer works, but in pieces, in which its flat copies have no room.
    parts["working"] = max(working, parts["working"])
    return RankMemory(activations=activations, **parts)


def _copied(config: TrainConfig, trained: int, optimizer: int, world_size: int) -> int:
    """What a rank copies, in bytes, of what is saved in the background; "auto" never does with full-lowmem."""
    asked = config.checkpoint.background
    if asked == "off" or (asked == "auto" and config.strategy == "full-lowmem"):
        return 0
    return (trained + (optimizer if config.checkpoint.optimizer else 0)) // world_size


def on_host_of(found: RankMemory, config: TrainConfig, ranks: int, host: int) -> RankMemory:
    """``found`` on a host of ``host`` bytes: the copy that checkpoint.background=auto makes only where it fits."""
    if config.checkpoint.background == "auto" and found.on_host(ranks) > usable(host):
        return dataclasses.replace(found, snapshot=0)
    return found


def _mapped(config: TrainConfig, plan: PreTrainedConfig, weights: int) -> RankMemory:
    """Frozen weights: their files' pages where the model's config tells that these have their dtype, else a copy."""
    of_files = str(plan.dtype).removeprefix("torch.")
    same = of_files == str(WEIGHT_DTYPES[config.precision]).removeprefix("torch.")
    return RankMemory(mapped=weights) if same else RankMemory(weights=weights)


def _at_once(params: Iterable[Tensor], *, tied: bool) -> int:
    """Bytes of bf16 gradients that stand beside each other where each is freed as soon as it was used.

    A tied embedding's gradient lives through backward, beside that of the weight being stepped, and in the end beside
    that of its other use.
    """
    largest, second, *_ = sorted((param.numel() for param in params), reverse=True)
    return 2 * (largest + (largest if tied else second))


def _factored(params: Iterable[Tensor]) -> int:
    return sum(4 * sum(sum(shape) for shape in state_shapes(param).values()) for param in params)


def _head_bytes(config: TrainConfig, model: PreTrainedModel, choice: Choice) -> int:
    """Logits and what becomes of them, and under autocast the layer's weights in bf16."""
    rows = config.loop.micro_batch * config.data.max_length
    vocabulary, width = model.get_output_embeddings().weight.shape
    autocast = config.precision == "bf16-autocast"
    copied = 2 * int(vocabulary) * int(width) if autocast else 0
    if not choice.chunked_head:
        return rows * int(vocabulary) * (2 + 3 * 4) + copied
    logits = rows * int(vocabulary) * (2 if autocast else model.dtype.itemsize)
    chunk = min(logits, CHUNK_BYTES)
    summed = 0 if config.strategy == "lora" or logits <= CHUNK_BYTES else 8 * int(vocabulary) * int(width)
    return int(chunk + summed + copied)


def _widest_bytes(config: TrainConfig, model: PreTrainedModel, choice: Choice) -> int:
    """Gradients of the widest layer's input and output, while backward is there; a head in chunks is no such layer."""
    rows = config.loop.micro_batch * config.data.max_length
    head = model.get_output_embeddings().weight if choice.chunked_head else None
    layers = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and p is not head]
    widest = max(max(layer.shape) for layer in layers)
    return int(4 * rows * widest * model.dtype.itemsize)


def _widened_bytes(config: TrainConfig, params: Iterable[Tensor]) -> int:
    """What products of bf16 keep on processors that do not multiply it."""
    if config.precision == "fp32":
        return 0
    rows = config.loop.micro_batch * config.data.max_length
    return kept_bytes(rows, [param.shape for param in params if param.ndim == 2])


def _kept_bytes(config: TrainConfig, model: PreTrainedModel, choice: Choice) -> int:
    """Bytes that forward of one micro-batch keeps for backward, each storage once, without the weights.

    Frozen weights keep less: with adapters, autograd drops inputs that only a weight's gradient would need.
    """
    if config.strategy == "lora":
        from falcon_dist.strategy.lora import Lora
        from falcon_dist.world import World

        Lora(config, World()).ready(model)
    if choice.fast_layers:
        FusedParts(model)
    if config.loop.grad_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    autocast = config.precision == "bf16-autocast"
    place = FakeTensorMode() if autocast else torch.device("meta")
    with place:
        if autocast:
            _make_fake(model)
        ids = torch.zeros(config.loop.micro_batch, config.data.max_length, dtype=torch.int64)
        beside = Masking.of(model).inputs(ids)
    known = {param.untyped_storage()._cdata for param in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    watched = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with place, watched, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model.base_model(input_ids=ids, use_cache=False, **beside)
    return sum(storage.nbytes() for storage in kept.values())


def _make_fake(model: PreTrainedModel) -> None:
    """Within FakeTensorMode: in the place of each tensor one that says it is on the CPU; tied ones stay one."""
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor not in made:
                    made[tensor] = torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
                if tensor is not None:
                    table[name] = made[tensor]


def fitting(config: TrainConfig, plan: PreTrainedConfig, world_size: int, ranks: int, host: int) -> str | None:
    """The nearest other strategy that fits ``ranks`` into ``host`` bytes, or None."""
    for name in NEAREST:
        try:
            asked = dataclasses.replace(config, strategy=name)
            check_agreement(asked)
            if name in STAGES:
                check_zero(asked)
            other = on_host_of(predict(asked, plan, world_size), asked, ranks, host)
        except UserError:
            continue
        if name != config.strategy and other.on_host(ranks) <= usable(host):
            return name
    return None


def usable(host: int) -> int:
    """Bytes of a host that ranks may fill."""
    return int(host * (1 - SPARE))


def check_fits(config: TrainConfig, plan: PreTrainedConfig, *, world_size: int, ranks: int, host: int) -> RankMemory:
    """What one rank will hold.

    Raises:
        UserError: ``ranks`` of them are more than a host has; names the nearest strategy that fits.
    """
    found = on_host_of(predict(config, plan, world_size), config, ranks, host)
    if found.on_host(ranks) <= usable(host):
        return found
    other = fitting(config, plan, world_size, ranks, host)
    cure = f"set strategy={other}" if other else "use fewer ranks a host, hosts with more memory, or shorter rows"
    raise UserError(
        f'strategy "{config.strategy}" needs {found.on_host(ranks) / GIB:.1f} GiB a host for {ranks} ranks, of '
        f"{host / GIB:.1f} GiB it has: {found.text()}; {cure}"
    )
