"""Attention over packed segments by one call of attention.cpp, which is made of AVX-512's products of bfloat16 pairs.

Heads are read and written as they lie, and what a query may not see is not multiplied but for the block that it is in.
It takes 0.25 to 0.7 of the time of batched products (docs/engine.md).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from falcon_dist.engine import kernels
from falcon_dist.engine.linear import has_tiles

LANES: Final = 16
TASKS: Final = 64
"""At least so many there are where heads share keys, if they allow; sums over heads follow it, not the threads."""
LINE: Final = 64
"""Bytes of a line of the cache: threads do not share one."""


class Segment(NamedTuple):
    """A run of tokens in a row, each of which attends to itself and those before it."""

    row: int
    first: int
    length: int


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these: bf16 heads 16 or a multiple of it wide, on a processor that it is compiled for.

    AMX multiplies faster, and is left to torch.
    """
    fits = query.shape[-1] % LANES == 0 and key.shape == value.shape and query.shape[-1] == key.shape[-1]
    laid = all(_is_laid(x) for x in (query, key, value))
    return (
        fits and laid and not has_tiles() and kernels.takes(query, key, value) and hasattr(kernels.loaded(), "attend")
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scale: float
) -> tuple[Tensor, Tensor]:
    """[B, H, T, D] output, as ``query`` lies, and [B, H, T] fp32 log-sum-exp of the scores.

    Args:
        query: [B, H, T, D] bf16.
        key: [B, G, T, D] bf16, H a multiple of G.
        value: as ``key``.
        segments: of all rows; what none of them covers is left undefined.
        scale: factor on the scores.
    """
    batch, heads, length, _ = query.shape
    out = torch.empty_like(query)
    norms = query.new_empty((batch, length, heads), dtype=torch.float32).transpose(1, 2)
    work = _Work.of(query, key, segments, scale)
    _run("attend", [query, key, value, out], norms, work)
    return out, norms


class Attended(NamedTuple):
    """What ``attend`` was given and made."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    norms: Tensor


def attend_backward(
    grad: Tensor, attended: Attended, segments: Sequence[Segment], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; those of a shared head are summed in fp32 over the queries that share it."""
    query, key, value, out, norms = attended
    assert grad.dtype == out.dtype == query.dtype
    assert grad.shape == out.shape == query.shape
    assert norms.shape == query.shape[:-1]
    assert norms.dtype == torch.float32
    made = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    work = _Work.of(query, key, segments, scale)
    tokens = sum(part.length for part in segments)
    sums = query.new_empty(2 * tokens * work.groups * work.parts * work.width, dtype=torch.float32)
    laid = [x if _is_laid(x) else x.contiguous() for x in (grad, out)]
    _run("attend_backward", [laid[0], query, key, value, laid[1], *made], norms, work, sums)
    return made


class _Work(NamedTuple):
    """Segments, and how the heads of each are cut."""

    segments: Sequence[Segment]
    scale: float
    groups: int
    """Heads of keys."""
    sharing: int
    """Heads of queries that share one."""
    parts: int
    """Of these; a task each."""
    width: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, segments: Sequence[Segment], scale: float) -> _Work:
        groups = key.shape[1]
        sharing, rest = divmod(query.shape[1], groups)
        assert rest == 0
        assert query.shape[::2] == key.shape[::2]
        assert all(part.row < len(query) and part.first + part.length <= query.shape[2] for part in segments)
        parts = min(sharing, -(-TASKS // (len(segments) * groups)))
        return cls(segments, scale, groups, sharing, parts, query.shape[-1])


def _is_laid(heads: Tensor) -> bool:
    """Whether each head's numbers lie side by side, and tokens at whole words of two of them."""
    return heads.stride(-1) == 1 and heads.stride(2) % 2 == 0


def _run(name: str, heads: Sequence[Tensor], norms: Tensor, work: _Work, *sums: Tensor) -> None:
    lib = kernels.loaded()
    assert lib is not None
    assert all(_is_laid(x) for x in heads)
    lib.attention_scratch.restype = ctypes.c_long
    longest = max(part.length for part in work.segments)
    each = -(-lib.attention_scratch(ctypes.c_long(longest), ctypes.c_long(work.width)) // LINE) * LINE
    threads = min(torch.get_num_threads(), len(work.segments) * work.groups * work.parts)
    scratch = norms.new_empty(threads * each, dtype=torch.uint8)
    spans = _longs(x for part in work.segments for x in part), ctypes.c_long(len(work.segments))
    places = _longs(x for one in heads for x in _place(one)), _longs(_place(norms)), _longs(work[2:])
    buffers = (ctypes.c_void_p(x.data_ptr()) for x in (*sums, scratch))
    getattr(lib, name)(
        *spans, *places, ctypes.c_float(work.scale), *buffers, ctypes.c_long(each), ctypes.c_int(threads)
    )


def _place(heads: Tensor) -> tuple[int, ...]:
    """Where they are, and the steps from row to row, head to head, token to token."""
    return heads.data_ptr(), *heads.stride()[:3]


def _longs(numbers: Iterable[int]) -> ctypes.Array[ctypes.c_long]:
    told = tuple(numbers)
    return (ctypes.c_long * len(told))(*told)
