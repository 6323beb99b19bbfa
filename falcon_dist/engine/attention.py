"""Causal attention inside each packed segment, without a mask: a kernel of our own over all of them or, one by one,
torch's fused kernel or batched products.

A segment is a run of one sample in a row; it begins where position_ids is 0. Keys of other segments are never
given to any of them, so nothing can leak, and work that a mask would throw away is not done.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor, library
from transformers import AttentionInterface
from transformers.models.falcon import modeling_falcon

from falcon_dist.engine import kernels, segment_kernel
from falcon_dist.engine.linear import has_tiles
from falcon_dist.engine.rotary import shared_heads
from falcon_dist.engine.segment_kernel import Attended, Segment
from falcon_dist.engine.segment_products import segment_gradients, segment_output

SEGMENTS: Final = "segments"
"""The name under which transformers' models find this attention."""

SHORTEST: Final = 128
"""Tokens of a segment from which batched products are faster, see docs/engine.md."""
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_SHARES_HEADS: Final = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
"""The forward kernel takes fewer heads of keys than of queries; that of torch 2.8 reads past them without a word."""

_Span = tuple[slice, slice, slice]
"""Index of a segment in a [B, H, T, ...] tensor."""


def spans(position_ids: Tensor, batch: int) -> Iterator[_Span]:
    """[B, T] or [1, T] positions -> where each segment lies; one span for all rows where every row is one segment."""
    rows, length = position_ids.shape
    starts = (position_ids == 0).nonzero().tolist()
    every = slice(None)
    if all(place == 0 for _, place in starts):
        yield every, every, every
        return
    of_row: list[list[int]] = [[0] for _ in range(rows)]
    for row, place in starts:
        if place:
            of_row[row].append(place)
    for row, places in enumerate(of_row):
        which = slice(row, row + 1) if rows == batch else every
        for first, end in zip(places, [*places[1:], length], strict=True):
            yield which, every, slice(first, end)


@library.custom_op("falcon_dist::segment_attention", mutates_args=())
def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each query to the keys of its own segment that are not ahead of it.

    Args:
        query: [B, H, T, D], of any layout; the output has the same.
        key: [B, G, T, D] with H a multiple of G: neighbouring query heads share one.
        value: as ``key``.
        position_ids: [B, T] or [1, T] int64; 0 begins a segment.
        scale: factor on the scores.

    Returns:
        [B, H, T, D] output and [B, H, T] fp32 log-sum-exp of the scores, kept for the backward pass.
    """
    batch, heads, length, _ = query.shape
    if segment_kernel.serves(query, key, value):
        return segment_kernel.attend(query, key, value, _segments(position_ids, batch), scale)
    if not _SHARES_HEADS:
        key, value = (_expand(x, heads // x.shape[1]) for x in (key, value))
    out = torch.empty_like(query)
    norms = torch.empty(batch, length, heads, dtype=torch.float32).transpose(1, 2)
    with torch.autocast("cpu", enabled=False):  # scores are fp32 by intent
        for span in spans(position_ids, batch):
            part, norm = _of_segment(query[span], key[span], value[span], scale)
            out[span] = part
            norms[span] = norm
    return out, norms


@library.custom_op("falcon_dist::segment_attention_backward", mutates_args=())
def segment_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    norms: Tensor,
    position_ids: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; those of a shared head are summed over the queries that share it."""
    if segment_kernel.serves(query, key, value):
        segments = _segments(position_ids, len(query))
        return segment_kernel.attend_backward(grad, Attended(query, key, value, out, norms), segments, scale)
    grads = tuple(torch.empty_like(x) for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        for span in spans(position_ids, query.shape[0]):
            parts = segment_gradients(grad[span], query[span], key[span], value[span], out[span], norms[span], scale)
            for whole, part in zip(grads, parts, strict=True):
                whole[span] = part
    return grads[0], grads[1], grads[2]


def _segments(position_ids: Tensor, batch: int) -> list[Segment]:
    """Where each segment lies, row by row."""
    length = position_ids.shape[1]
    assert len(position_ids) in (1, batch)
    return [
        Segment(row, first, end - first)
        for rows, _, tokens in spans(position_ids, batch)
        for row in range(batch)[rows]
        for first, end, _ in [tokens.indices(length)]
    ]


def _of_segment(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """torch's kernel, the faster one with AMX and for short segments, or batched products."""
    if query.shape[2] >= SHORTEST and not has_tiles() and kernels.takes(query, key, value):
        return segment_output(query, key, value, scale)
    return _forward(query, key, value, 0.0, True, scale=scale)  # type: ignore[no-any-return]


def _expand(heads: Tensor, groups: int) -> Tensor:
    """[B, G, T, D] -> [B, G x groups, T, D]; no copy where one head serves all."""
    return (
        heads.repeat_interleave(groups, dim=1)
        if groups > 1 and heads.shape[1] > 1
        else heads.expand(-1, groups * heads.shape[1], -1, -1)
    )


@segment_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    return torch.empty_like(query), query.new_empty(batch, length, heads, dtype=torch.float32).transpose(1, 2)


@segment_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    norms: Tensor,
    position_ids: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, position_ids, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, position_ids)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, out, norms, position_ids = ctx.saved_tensors
    grads = torch.ops.falcon_dist.segment_attention_backward(
        grad, query, key, value, out, norms, position_ids, ctx.scale
    )
    return *grads, None, None


segment_attention.register_autograd(_differentiate, setup_context=_keep)


def attend(query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, scale: float) -> Tensor:
    """[B, H, T, D] heads -> [B, T, H, D]. Under autocast rotary embedding leaves queries in fp32 beside bf16 values."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    out: Tensor = segment_attention(query, key, value, position_ids, scale)[0]
    return out.transpose(1, 2)


def _interface(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    position_ids: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' AttentionInterface: [B, H, T, D] -> ([B, T, H, D], no weights)."""
    assert attention_mask is None, "segments are told by position_ids"
    return attend(query, key, value, position_ids, scaling), None


class SegmentFalconAttention(modeling_falcon.FalconAttention):  # type: ignore[misc]
    """Falcon's attention, its parameters untouched, which the interface above does not reach in transformers 5.

    Heads are split without copying shared keys and values. Under any other name it is its parent.
    """

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, width] -> ([B, T, width], no weights)."""
        if self.config._attn_implementation != SEGMENTS:
            return super().forward(  # type: ignore[no-any-return]
                hidden_states, *args, position_ids=position_ids, position_embeddings=position_embeddings, **kwargs
            )
        assert position_ids is not None
        assert position_embeddings is not None
        query, key, value = self._turned_heads(self.query_key_value(hidden_states), *position_embeddings)
        out = attend(query, key, value, position_ids, self.head_dim**-0.5)
        return self.dense(out.flatten(2)), None

    def _turned_heads(self, fused: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """[B, T, fused] -> [B, H, T, D] queries, [B, G, T, D] keys, both with their positions, and values."""
        if self.multi_query and not self.new_decoder_architecture and cos.dtype == fused.dtype:
            heads = shared_heads(fused.view(*fused.shape[:2], -1, self.head_dim), cos, sin)
            return tuple(x.transpose(1, 2) for x in heads)
        query, key, value = (heads.transpose(1, 2) for heads in self._heads(fused))
        return *modeling_falcon.apply_rotary_pos_emb(query, key, cos, sin), value

    def _heads(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, fused] -> [B, T, H, D] queries, [B, T, G, D] keys and values."""
        if not self.new_decoder_architecture:
            return self._split_heads(fused)  # type: ignore[no-any-return]
        groups = fused.view(*fused.shape[:2], self.num_kv_heads, -1, self.head_dim)
        return groups[:, :, :, :-2].flatten(2, 3), groups[:, :, :, -2], groups[:, :, :, -1]


def register() -> None:
    """Makes ``attn_implementation="segments"`` known to transformers: its public interface, and Falcon's own table."""
    AttentionInterface.register(SEGMENTS, _interface)
    modeling_falcon.FALCON_ATTENTION_CLASSES[SEGMENTS] = SegmentFalconAttention
