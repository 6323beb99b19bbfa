"""Weight-only quantisation by torchao for inference: int8 a row, int4 a group of columns; activations stay bf16.

The output head and the embeddings stay as they are: they cost the most quality for the least room.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from falcon_dist.contract import UserError

Kind = Literal["int8", "int4"]
GROUPS: Final = (32, 64, 128)
"""Columns that share a scale in int4, the smallest that divides a layer's; 32 rows are packed together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """What was done."""

    layers: int
    left: tuple[str, ...]
    """Linear layers of a shape that the packing does not take, the head not counted."""


def quantize(model: PreTrainedModel, kind: Kind) -> Quantized:
    """Replaces the weights of the model's linear layers in place.

    Raises:
        UserError: torchao is not installed, or the weights are not bf16.
    """
    if model.dtype != torch.bfloat16:
        raise UserError(f'--quantize: weights must be bf16: "{model.dtype}"; leave --precision out')
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    left = []
    for name in names:
        plain = _plain(model, name)
        settings = _settings(kind, plain)
        if settings is None:
            left.append(name)
        else:
            _torchao().quantize_(plain, settings)
    return Quantized(layers=len(names) - len(left), left=tuple(left))


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


def _settings(kind: Kind, layer: nn.Linear) -> Any:
    """torchao's configuration for this layer, None where its shape does not fit."""
    if kind == "int8":
        return _torchao().Int8WeightOnlyConfig(set_inductor_config=False)
    group = next((size for size in GROUPS if layer.in_features % size == 0), None)
    if group is None or layer.out_features % 32:
        return None
    return _torchao("prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(group, set_inductor_config=False)


def _torchao(part: str = "quantization") -> Any:
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        return importlib.import_module(f"torchao.{part}")
    except ImportError as error:
        raise UserError("--quantize: torchao is not installed; run pip install 'falcon-dist[quantize]'") from error


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the model's parameters take, packed ones with their scales; tied ones once."""
    return sum(_bytes(param) for param in model.parameters())


def _bytes(tensor: torch.Tensor) -> int:
    names = (*getattr(tensor, "tensor_data_names", ()), *getattr(tensor, "optional_tensor_data_names", ()))
    parts = [part for name in names if (part := getattr(tensor, name, None)) is not None]
    return sum(part.nbytes for part in parts) if parts else tensor.nbytes
