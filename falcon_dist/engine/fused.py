"""A Llama's norms, gated MLPs and attention with fewer passes over memory, and less kept for backward.

A norm keeps its input and a number a row instead of fp32 copies of both; a gated MLP keeps no activated gate.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from falcon_dist.engine import kernels
from falcon_dist.engine.attention import SEGMENTS, attend
from falcon_dist.engine.linear import give_back, own_forward
from falcon_dist.engine.rotary import turned_heads

SILU: Final = ("silu", "swish")


class _Gated(torch.autograd.Function):
    """silu(gate) * up"""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernels.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.swiglu_backward(grads[0], *ctx.saved_tensors)


class _Norm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = kernels.rms(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        of_x, of_weight = kernels.rms_backward(grads[0], *ctx.saved_tensors)
        return of_x, of_weight if ctx.needs_input_grad[1] else None, None


class FusedParts:
    """The model's parts with their forward replaced, until ``remove``; their place, parameters and hooks are kept."""

    def __init__(self, model: nn.Module) -> None:
        made = [(part, forward) for part in model.modules() if (forward := _forward_of(part))]
        self._before = [(part, own_forward(part)) for part, _ in made]
        for part, forward in made:
            part.forward = forward

    def remove(self) -> None:
        """Gives each part back what forward it had."""
        for part, before in self._before:
            give_back(part, before)


def _forward_of(part: nn.Module) -> Any:
    if isinstance(part, modeling_llama.LlamaRMSNorm):
        return _norm(part)
    if isinstance(part, modeling_llama.LlamaMLP) and part.config.hidden_act in SILU:
        return _mlp(part)
    if isinstance(part, modeling_llama.LlamaAttention) and part.config._attn_implementation == SEGMENTS:
        return _attention(part)
    return None


def _norm(part: Any) -> Any:
    plain = part.forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype != part.weight.dtype:
            return plain(x)  # type: ignore[no-any-return]
        made: Tensor = _Norm.apply(x, part.weight, part.variance_epsilon)  # type: ignore[no-untyped-call]
        return made

    return forward


def _mlp(part: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        made: Tensor = part.down_proj(_Gated.apply(part.gate_proj(x), part.up_proj(x)))  # type: ignore[no-untyped-call]
        return made

    return forward


def _attention(part: Any) -> Any:
    def forward(
        hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *, position_ids: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        layers = (part.q_proj, part.k_proj, part.v_proj)
        query, key, value = (layer(hidden_states).unflatten(-1, (-1, part.head_dim)) for layer in layers)
        cos, sin = position_embeddings
        if cos.dtype == query.dtype:
            query, key = turned_heads(query, cos, sin), turned_heads(key, cos, sin)
        else:
            query, key = modeling_llama.apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return part.o_proj(attend(query, key, value, position_ids, part.scaling).flatten(2)), None

    return forward
