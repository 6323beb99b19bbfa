"""Rotary position embedding (Su and others 2021, arXiv:2104.09864) in three passes over the heads instead of seven.

In Falcon's attention with one shared key, queries and key take them together, and their gradients go straight into
that of the fused product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def turned(heads: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """Writes [B, T, H, D] heads, turned by their positions' angles, to ``out``; cos and sin are [B, T, D]."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    half = heads.shape[-1] // 2
    torch.mul(heads, cos, out=out)
    out[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return out


class _SharedHeads(torch.autograd.Function):
    """[B, T, H + 2, D], H query heads and the key and value that they share -> turned queries and key, and value."""

    @staticmethod
    def forward(ctx: Any, fused: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        heads = fused[:, :, :-1]
        turn = turned(heads, cos, sin, heads.new_empty(heads.shape))
        return turn[:, :, :-1], turn[:, :, -1:], fused[:, :, -1:].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        query, key, value = grads
        cos, sin = ctx.saved_tensors
        batch, length, heads, width = query.shape
        fused = query.new_empty(batch, length, heads + 2, width)
        turned(query, cos, -sin, fused[:, :, :-2])
        turned(key, cos, -sin, fused[:, :, -2:-1])
        fused[:, :, -1:] = value
        return fused, None, None


def shared_heads(fused: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Splits a fused product of H queries, one key and one value a token, and turns what has a position.

    Args:
        fused: [B, T, H + 2, D].
        cos: [B, T, D] or [1, T, D], in the heads' dtype; its halves are alike.
        sin: as ``cos``.

    Returns:
        [B, T, H, D] queries, [B, T, 1, D] key, [B, T, 1, D] value.
    """
    made: tuple[Tensor, Tensor, Tensor] = _SharedHeads.apply(fused, cos, sin)  # type: ignore[no-untyped-call]
    return made
