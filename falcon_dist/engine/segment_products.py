"""Causal attention over one segment, as batched products in blocks of queries that stay in the cache.

torch's own backward kernel for CPUs multiplies bfloat16 outside of the matrix units; on a processor with AMX these
products take a quarter of its time for segments of a few hundred tokens, and without AMX forward gains too
(docs/engine.md). Query heads that share a key head are rows of one product, so that shared gradients are summed inside
it. The mathematics is that of FlashAttention-2 (arXiv:2307.08691, algorithm 2).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from falcon_dist.engine import kernels

SCORES_AT_ONCE: Final = 3 << 17
"""Scores of all heads in a block of queries: 1.5 MiB in fp32."""
BLOCK_MULTIPLE: Final = 32


class SegmentGradients(NamedTuple):
    """Gradients of one segment."""

    query: Tensor
    """[B, H, T, D]"""
    key: Tensor
    """[B, G, T, D], summed over the query heads that share it."""
    value: Tensor


def segment_output(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[B, H, T, D] output in bf16 and [B, H, T] fp32 log-sum-exp of the scores, where kernels take these.

    Args:
        query: [B, H, T, D].
        key: [B, G, T, D], H a multiple of G.
        value: as ``key``.
        scale: factor on the scores.
    """
    batch, groups, length, width = key.shape
    flat = (batch * groups, query.shape[1] // groups)
    keys, values = (x.reshape(flat[0], length, width) for x in (key.float(), value))
    out, norms = torch.empty_like(query), torch.empty(query.shape[:-1], dtype=torch.float32)
    rows = block_rows(query.shape[0] * query.shape[1], length)
    for start in range(0, length, rows):
        end = min(length, start + rows)
        taken = query[:, :, start:end].reshape(flat[0], -1, width).float()
        scores = torch.bmm(taken, keys[:, :end].transpose(1, 2))
        weights, found = kernels.causal_softmax(scores, end - start, scale)
        out[:, :, start:end] = torch.bmm(weights, values[:, :end]).view(batch, -1, end - start, width)
        norms[:, :, start:end] = found.view(batch, -1, end - start)
    return out, norms


def segment_gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, norms: Tensor, scale: float
) -> SegmentGradients:
    """Gradients of causal attention, in the inputs' dtype; probabilities are computed again, in fp32.

    Args:
        grad: [B, H, T, D] gradient of the output.
        query: [B, H, T, D].
        key: [B, G, T, D], H a multiple of G.
        value: as ``key``.
        out: [B, H, T, D], what forward gave.
        norms: [B, H, T] fp32 log-sum-exp of the scores, what forward gave.
        scale: factor on the scores.
    """
    batch, groups, length, width = key.shape
    flat = (batch * groups, query.shape[1] // groups)
    keys, values = (x.reshape(flat[0], length, width) for x in (key, value))
    dots = (grad * out).sum(-1, dtype=torch.float32)
    by_query = torch.empty_like(query)
    by_key, by_value = (torch.zeros(flat[0], length, width, dtype=torch.float32) for _ in range(2))
    rows = block_rows(query.shape[0] * query.shape[1], length)
    for start in range(0, length, rows):
        end = min(length, start + rows)
        taken = [x[:, :, start:end].reshape(flat[0], -1, *x.shape[3:]) for x in (grad, query, norms, dots)]
        q, k, v = _block(taken, keys[:, :end], values[:, :end], flat[1], scale)
        by_query[:, :, start:end] = q.view(batch, -1, end - start, width)
        by_key[:, :end] += k
        by_value[:, :end] += v
    shaped = (x.to(key.dtype).view(batch, groups, length, width) for x in (by_key, by_value))
    return SegmentGradients(by_query, *shaped)


def block_rows(heads: int, length: int) -> int:
    """Queries taken at once, so that the scores of all heads stay in the cache."""
    return max(BLOCK_MULTIPLE, SCORES_AT_ONCE // (heads * length) // BLOCK_MULTIPLE * BLOCK_MULTIPLE)


def _block(
    taken: list[Tensor], keys: Tensor, values: Tensor, sharing: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a block of queries, and its part of those of the keys and values up to its end."""
    grad, query, norms, dots = taken
    scores, by_weights = torch.bmm(query.float(), keys.float().transpose(1, 2)), torch.bmm(grad, values.transpose(1, 2))
    if kernels.takes(by_weights):
        queries = query.shape[1] // sharing
        weights = kernels.causal_gradient_(scores, by_weights, norms, dots, queries=queries, scale=scale)
        return (
            torch.bmm(by_weights, keys),
            torch.bmm(by_weights.transpose(1, 2), query),
            torch.bmm(weights.transpose(1, 2), grad),
        )
    shape = (len(query), sharing, query.shape[1] // sharing, keys.shape[1])
    weights = scores.mul_(scale).sub_(norms.unsqueeze(-1)).exp_()
    weights.view(shape)[..., shape[3] - shape[2] :].tril_()  # keys before the block are behind all of its queries
    by_scores = by_weights.float().sub_(dots.unsqueeze(-1)).mul_(weights).mul_(scale).to(query.dtype)
    by_value = torch.bmm(weights.to(query.dtype).transpose(1, 2), grad)
    return torch.bmm(by_scores, keys), torch.bmm(by_scores.transpose(1, 2), query), by_value
