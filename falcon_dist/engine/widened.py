"""Products of bf16 matrices on processors that cannot multiply bf16: widened to fp32, multiplied, rounded once.

oneDNN multiplies bf16 where there is AVX-512 or more. On others (EPYC before its fourth generation, Xeon before
Skylake) torch is left with loops of its own, at between a quarter and less than a hundredth of fp32's rate
(docs/engine.md). The products here have the same inputs, the same fp32 sums and the same rounding; they go through
torch's own fp32 kernels, cut along the longest of their sides, so that what is widened stays in the cache. Memory for
it is taken once a thread and kept.

They are put in the place of torch's CPU kernels for four operators, in this process, so that whatever multiplies
gains: layers, attention, gradients, adapters, DeepSpeed.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, library

PIECE: Final = 1 << 21
"""Numbers of what is cut that are in fp32 at once: 8 MiB."""
MULTIPLE: Final = 64
"""Rows, columns or terms of sums in a piece, at least."""
REUSE: Final = 3
"""Products a number of operands and result, from which widening pays: a row or two are faster as they are."""
LEAST: Final = 1 << 17
"""Products in all, from which it pays: what surrounds them takes as long as so many of torch's own."""
_aten = torch.ops.aten
_kept = threading.local()


class _Weighted(NamedTuple):
    """What is added to a product, and both their factors."""

    added: Tensor
    beta: float
    alpha: float


class _Cut(NamedTuple):
    """How a product of [rows, inner] and [inner, columns] is cut."""

    side: int
    """0: rows, 1: inner, 2: columns."""
    step: int
    """Of that side in a piece."""

    @classmethod
    def of(cls, sides: Sequence[int], *, summed: bool) -> _Cut:
        """Along the longest side, the inner one where both others are shorter and ``summed`` allows it.

        A right operand whose columns lie together, as a weight's in forward, is slow to read a few terms at a time.
        """
        side = max((2, 0, 1) if summed else (2, 0), key=lambda side: sides[side])
        beside = max(n for other, n in enumerate(sides) if other != side)
        return cls(side, max(MULTIPLE, PIECE // max(1, beside) // MULTIPLE * MULTIPLE))

    def numbers(self, sides: Sequence[int]) -> tuple[int, int, int]:
        """Of the operand that is whole (the left one, where each is cut), of a piece of the other and of a result."""
        rows, inner, columns = (min(n, self.step) if side == self.side else n for side, n in enumerate(sides))
        left, right = rows * inner, inner * columns
        return (right, left, rows * columns) if self.side == 0 else (left, right, rows * columns)


@cache
def install() -> library.Library | None:
    """Puts the products in the place of torch's, once, for the rest of this process; None: oneDNN multiplies bf16."""
    if multiplies_bf16():
        return None
    made = library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, kernel in {"mm": mm, "addmm": addmm, "bmm": bmm, "baddbmm": baddbmm}.items():
            made.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    return made


def multiplies_bf16() -> bool:
    """Whether oneDNN has products of bf16 for this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def kept_bytes(rows: int, matrices: Sequence[Sequence[int]]) -> int:
    """The most that a thread keeps for products of ``rows`` tokens with [N, K] matrices and for their gradients.

    Batches of products, as attention has them, take a piece in each place; a larger one is cut as these are.
    """
    if multiplies_bf16():
        return 0
    forward = [((rows, k, n), False) for n, k in matrices]
    gradients = [(sides, True) for n, k in matrices for sides in ((rows, n, k), (n, rows, k))]
    places = zip(*(_Cut.of(s, summed=summed).numbers(s) for s, summed in forward + gradients), strict=True)
    return sum(4 * max(PIECE, *map(int, found)) for found in places)


def mm(left: Tensor, right: Tensor) -> Tensor:
    """aten::mm, [M, K] @ [K, N]; torch's own kernel for other dtypes, and where widening does not pay."""
    if not _pays(left, right, 2):
        return _aten.mm.out(left, right, out=left.new_empty(0))  # type: ignore[no-any-return]
    return _product(left, right)


def addmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """aten::addmm, ``beta * added + alpha * left @ right``; ``added`` can be broadcast to [M, N]."""
    if not _pays(left, right, 2) or added.dtype != torch.bfloat16:
        out = left.new_empty(0)
        return _aten.addmm.out(added, left, right, beta=beta, alpha=alpha, out=out)  # type: ignore[no-any-return]
    return _product(left, right, _Weighted(added.expand(left.shape[0], right.shape[1]), beta, alpha))


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """aten::bmm, [B, M, K] @ [B, K, N]."""
    if not _pays(left, right, 3):
        return _aten.bmm.out(left, right, out=left.new_empty(0))  # type: ignore[no-any-return]
    return _products(left, right)


def baddbmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """aten::baddbmm, ``beta * added + alpha * left @ right``; ``added`` can be broadcast to [B, M, N]."""
    if not _pays(left, right, 3) or added.dtype != torch.bfloat16:
        out = left.new_empty(0)
        return _aten.baddbmm.out(added, left, right, beta=beta, alpha=alpha, out=out)  # type: ignore[no-any-return]
    return _products(left, right, _Weighted(added.expand(*left.shape[:2], right.shape[2]), beta, alpha))


def _pays(left: Tensor, right: Tensor, dims: int) -> bool:
    both = (left.dtype, right.dtype) == (torch.bfloat16, torch.bfloat16)
    if not both or (left.dim(), right.dim()) != (dims, dims):
        return False
    if (*left.shape[:-2], left.shape[-1]) != right.shape[:-1]:
        return False  # torch refuses it, in its own words
    rows, inner, columns = *left.shape[-2:], right.shape[-1]
    reused = rows * inner * columns > REUSE * (rows * inner + inner * columns + rows * columns)
    return bool(reused and left.numel() * columns > LEAST)


def _product(left: Tensor, right: Tensor, weighted: _Weighted | None = None) -> Tensor:
    """[M, K] and [K, N] -> [M, N] in bf16."""
    cut = _Cut.of((*left.shape, right.shape[1]), summed=not _turned(right))
    if cut.side == 1:
        return _summed(left, right, cut.step, weighted)
    by_rows = cut.side == 0
    whole = _wide("whole", right if by_rows else left)
    out = left.new_empty(left.shape[0], right.shape[1])
    for start in range(0, out.shape[cut.side // 2], cut.step):
        part = slice(start, start + cut.step)
        where = (part, slice(None)) if by_rows else (slice(None), part)
        piece = _wide("piece", left[part] if by_rows else right[:, part])
        made = _space("out", out[where].shape)
        _multiply(*((piece, whole) if by_rows else (whole, piece)), made, weighted and _part(weighted, where))
        out[where] = made
    return out


def _summed(left: Tensor, right: Tensor, step: int, weighted: _Weighted | None) -> Tensor:
    """The same, one part of the sums after the other."""
    made = _space("out", (left.shape[0], right.shape[1]))
    for start in range(0, left.shape[1], step):
        part = slice(start, start + step)
        pieces = _wide("whole", left[:, part]), _wide("piece", right[part])
        if start:
            _aten.addmm.out(made, *pieces, alpha=1 if weighted is None else weighted.alpha, out=made)
        else:
            _multiply(*pieces, made, weighted)
    return made.to(torch.bfloat16)


def _products(left: Tensor, right: Tensor, weighted: _Weighted | None = None) -> Tensor:
    """[B, M, K] and [B, K, N] -> [B, M, N] in bf16, as many at once as a piece holds."""
    out = left.new_empty(*left.shape[:2], right.shape[2])
    count = PIECE // max(math.prod(x.shape[1:]) for x in (left, right, out))
    if count == 0:
        for n, place in enumerate(out):
            place.copy_(_product(left[n], right[n], weighted and _part(weighted, n)))
        return out
    for start in range(0, len(out), count):
        part = slice(start, start + count)
        made = _space("out", out[part].shape)
        wide = _wide("whole", left[part]), _wide("piece", right[part])
        _multiply(*wide, made, weighted and _part(weighted, part))
        out[part] = made
    return out


def _part(weighted: _Weighted, where: Any) -> _Weighted:
    return weighted._replace(added=weighted.added[where])


def _multiply(left: Tensor, right: Tensor, out: Tensor, weighted: _Weighted | None) -> None:
    """A product in fp32, or a batch of them, written to ``out``."""
    batch = left.dim() == 3
    if weighted is None:
        (_aten.bmm if batch else _aten.mm).out(left, right, out=out)
        return
    added, beta, alpha = weighted
    (_aten.baddbmm if batch else _aten.addmm).out(out.copy_(added), left, right, beta=beta, alpha=alpha, out=out)


def _wide(place: str, tensor: Tensor) -> Tensor:
    """A copy in fp32, which lies as the tensor does: with its rows or its columns together."""
    turned = _turned(tensor)
    plain = tensor.transpose(-2, -1) if turned else tensor
    copied = _space(place, plain.shape).copy_(plain)
    return copied.transpose(-2, -1) if turned else copied


def _turned(tensor: Tensor) -> bool:
    """Whether its columns lie together, not its rows."""
    return tensor.stride(-2) < tensor.stride(-1)


def _space(place: str, shape: Sequence[int]) -> Tensor:
    """fp32 memory of this thread, of one of its three places; what was there before is no longer needed."""
    held: dict[str, Tensor] = vars(_kept)
    count = math.prod(shape)
    if place not in held or held[place].numel() < count:
        with torch.inference_mode(False):  # memory taken in inference mode could not be written outside of it
            held[place] = torch.empty(count, dtype=torch.float32)
    return held[place][:count].view(tuple(shape))
