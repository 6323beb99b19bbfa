"""Weight-only quantisation by torchao for inference: int8 a row, int4 a group of columns; activations stay bf16.

The output head and the embeddings stay as they are: they cost the most quality for the least room. Quantised
weights have two shapes: the one that is kept on disk (torchao's Int8Tensor and Int4Tensor, which stock transformers
loads), and the one that this CPU multiplies (``ready``).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from falcon_dist.contract import UserError

Kind = Literal["int8", "int4"]
GROUP: Final = 32
"""Columns that share a scale and a zero in int4; the CPU's kernel also packs as many rows together."""
HIGHEST: Final = 15
"""int4 as torch's CPU kernel counts it, from 0; torchao's Int4Tensor counts from -8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """What was done."""

    layers: int
    left: tuple[str, ...]
    """Linear layers of a shape that the packing does not take, the head not counted."""


def quantize_layers(model: PreTrainedModel, kind: Kind) -> Quantized:
    """Replaces the weights of the model's linear layers in place, in the form that is kept on disk.

    Raises:
        UserError: torchao is not installed, or the weights are not bf16 or quantised already.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError("quantize: the weights are quantised already; take the model that they were made from")
    if model.dtype != torch.bfloat16:
        raise UserError(f'quantize: weights must be bf16: "{model.dtype}"; leave --precision out')
    names = list(_linear_names(model))
    left = [name for name in names if not _fits(kind, model.get_submodule(name).weight)]
    for name in set(names) - set(left):
        _quantize(_plain(model, name), kind)
    return Quantized(layers=len(names) - len(left), left=tuple(left))


def ready(model: PreTrainedModel) -> None:
    """Makes a model with quantised weights fit to run on this CPU, in place; nothing is lost or rounded again."""
    int4 = torchao("quantization").Int4Tensor
    for name in _linear_names(model):
        if type(model.get_submodule(name).weight.data) is torch.Tensor:
            continue
        layer = _plain(model, name)
        if isinstance(layer.weight, int4):
            layer.weight = nn.Parameter(_for_cpu(layer.weight), requires_grad=False)


def _linear_names(model: PreTrainedModel) -> Iterator[str]:
    """The linear layers but the output head."""
    head = model.get_output_embeddings()
    return (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head)


def _plain(model: nn.Module, name: str) -> nn.Linear:
    """The layer as a stock nn.Linear: Falcon's own class multiplies by hand, which packed weights do not take."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    if type(layer) is nn.Linear:
        return layer
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    plain.train(layer.training)
    model.set_submodule(name, plain)
    return plain


def _fits(kind: Kind, weight: torch.Tensor) -> bool:
    return kind == "int8" or not any(size % GROUP for size in weight.shape)


def _quantize(layer: nn.Linear, kind: Kind) -> None:
    if kind == "int8":
        torchao("quantization").quantize_(layer, disk_settings(kind))
    else:
        layer.weight = nn.Parameter(_int4(layer.weight.detach()), requires_grad=False)


def disk_settings(kind: Kind) -> Any:
    """torchao's name for the form on disk."""
    if kind == "int8":
        return torchao("quantization").Int8WeightOnlyConfig(set_inductor_config=False)
    return torchao("quantization").Int4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)


def _int4(weight: torch.Tensor) -> Any:
    """[N, K] bf16 -> Int4Tensor, rounded as torchao does for CPUs (which packs at once and cannot be kept on disk)."""
    primitives = torchao("quantization.quant_primitives")
    block, asymmetric = [1, GROUP], primitives.MappingType.ASYMMETRIC
    scale, zero = primitives._choose_qparams_affine_tinygemm(
        weight, asymmetric, block, torch.int32, 0, HIGHEST, 1e-6, None, weight.dtype
    )
    numbers = primitives._quantize_affine_tinygemm(weight, block, scale, zero, torch.int32, 0, HIGHEST)
    centred = (numbers - (HIGHEST + 1) // 2).to(torch.int8)
    packed = (centred[:, ::2] & HIGHEST) | (centred[:, 1::2] << 4)
    scale, zero = (part.reshape(len(weight), -1).t().contiguous() for part in (scale, zero))
    return torchao("quantization").Int4Tensor(packed, scale, zero, block, weight.shape)


def _for_cpu(weight: Any) -> Any:
    """The same numbers as torch's CPU kernel wants them."""
    unsigned = weight.qdata.view(torch.uint8) ^ 0x88  # two's complement from -8 -> from 0, both halves at once
    numbers = torch.stack([unsigned & HIGHEST, unsigned >> 4], dim=-1).flatten(-2).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    both = torch.stack([weight.scale, weight.zero_point], dim=-1).contiguous()
    opaque = torchao("prototype.quantization.int4").Int4OpaqueTensor
    return opaque(packed, both, weight.block_size, weight.shape)


def torchao(part: str) -> Any:
    """A module of torchao.

    Raises:
        UserError: it is not installed.
    """
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        return importlib.import_module(f"torchao.{part}")
    except ImportError as error:
        raise UserError("quantize: torchao is not installed; run pip install 'falcon-dist[quantize]'") from error


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's parameters take, packed ones with their scales; tied ones once."""
    return sum(_bytes(param) for param in model.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    names = (*getattr(tensor, "tensor_data_names", ()), *getattr(tensor, "optional_tensor_data_names", ()))
    parts = [part for name in names if (part := getattr(tensor, name, None)) is not None]
    return sum(part.nbytes for part in parts) if parts else tensor.nbytes
