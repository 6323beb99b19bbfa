"""Rotary position embedding (Su and others 2021, arXiv:2104.09864) in three passes over the heads instead of seven.

In Falcon's attention with one shared key, queries and key take them together, and their gradients go straight into
that of the fused product. Where there is a compiled kernel, it takes one pass (kernels.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from falcon_dist.engine import kernels


def turned(heads: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool = False) -> Tensor:
    """Writes [B, T, H, D] heads, turned by their positions' angles or ``back``, to ``out``; cos, sin are [B, T, D]."""
    if kernels.turn(heads, cos, sin, out, back=back):
        return out
    cos, sin = cos.unsqueeze(2), (-sin if back else sin).unsqueeze(2)
    half = heads.shape[-1] // 2
    torch.mul(heads, cos, out=out)
    out[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return out


class _Heads(torch.autograd.Function):
    """[B, T, H, D] heads -> the same, turned."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(heads, cos, sin, heads.new_empty(heads.shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turned(grads[0], cos, sin, grads[0].new_empty(grads[0].shape), back=True), None, None


def turned_heads(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, T, H, D] heads turned by [B, T, D] or [1, T, D] angles of the same dtype, whose halves are alike."""
    made: Tensor = _Heads.apply(heads, cos, sin)  # type: ignore[no-untyped-call]
    return made


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
        turned(query, cos, sin, fused[:, :, :-2], back=True)
        turned(key, cos, sin, fused[:, :, -2:-1], back=True)
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
