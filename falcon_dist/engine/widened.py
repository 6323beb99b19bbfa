"""Products of bf16 matrices on processors that cannot multiply bf16: widened to fp32, multiplied, rounded once.

oneDNN multiplies bf16 where there is AVX-512 or more. On others (EPYC before its fourth generation, Xeon before
Skylake) torch is left with loops of its own, at a quarter to a three-hundredth of fp32's rate (docs/engine.md). The
products here have the same inputs, the same fp32 sums and the same rounding; they go through torch's own fp32 kernels,
a piece of the larger operand at a time, so that what is widened stays in the cache. Memory for it is taken once a
thread and kept.

They are put in the place of torch's CPU kernels for four operators, in this process, so that whatever multiplies
gains: layers, attention, gradients, adapters, DeepSpeed.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Final

import torch
from torch import Tensor, library

PIECE: Final = 1 << 21
"""Numbers of the larger operand that are widened at once, and of the result they make: 8 MiB in fp32."""
MULTIPLE: Final = 64
"""Rows or columns of a piece, at least."""
REUSE: Final = 8
"""Products a number of operands and result, from which widening pays: a row or a few are faster as they are."""
_aten = torch.ops.aten
_kept = threading.local()


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
    """The most that a thread keeps for products of ``rows`` tokens with [N, K] matrices and for their gradients."""
    if multiplies_bf16():
        return 0
    whole = max(
        max(min(rows, outer) * inner, min(rows, inner) * outer, min(outer, inner) * rows) for outer, inner in matrices
    )
    longest = max(rows, *(side for matrix in matrices for side in matrix))
    return 4 * (whole + 2 * max(PIECE, MULTIPLE * longest))


def mm(left: Tensor, right: Tensor) -> Tensor:
    """aten::mm, [M, K] @ [K, N]; torch's own kernel for other dtypes, and where widening does not pay."""
    if not _pays(left, right, 2):
        return _aten.mm.out(left, right, out=left.new_empty(0))  # type: ignore[no-any-return]
    return _product(left, right, lambda a, b, out, _: _aten.mm.out(a, b, out=out))


def addmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """aten::addmm, ``beta * added + alpha * left @ right``; ``added`` can be broadcast to [M, N]."""
    if not _pays(left, right, 2) or added.dtype != torch.bfloat16:
        out = left.new_empty(0)
        return _aten.addmm.out(added, left, right, beta=beta, alpha=alpha, out=out)  # type: ignore[no-any-return]
    whole = added.expand(left.shape[0], right.shape[1])

    def piece(a: Tensor, b: Tensor, out: Tensor, where: tuple[slice, slice]) -> None:
        _aten.addmm.out(out.copy_(whole[where]), a, b, beta=beta, alpha=alpha, out=out)

    return _product(left, right, piece)


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """aten::bmm, [B, M, K] @ [B, K, N]."""
    if not _pays(left, right, 3):
        return _aten.bmm.out(left, right, out=left.new_empty(0))  # type: ignore[no-any-return]
    out = _space("out", (*left.shape[:2], right.shape[2]))
    return _aten.bmm.out(_wide("whole", left), _wide("piece", right), out=out).to(torch.bfloat16)  # type: ignore[no-any-return]


def baddbmm(added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """aten::baddbmm, ``beta * added + alpha * left @ right``; ``added`` can be broadcast to [B, M, N]."""
    if not _pays(left, right, 3) or added.dtype != torch.bfloat16:
        out = left.new_empty(0)
        return _aten.baddbmm.out(added, left, right, beta=beta, alpha=alpha, out=out)  # type: ignore[no-any-return]
    out = _space("out", (*left.shape[:2], right.shape[2])).copy_(added)
    wide = _wide("whole", left), _wide("piece", right)
    return _aten.baddbmm.out(out, *wide, beta=beta, alpha=alpha, out=out).to(torch.bfloat16)  # type: ignore[no-any-return]


def _pays(left: Tensor, right: Tensor, dims: int) -> bool:
    both = (left.dtype, right.dtype) == (torch.bfloat16, torch.bfloat16)
    if not both or (left.dim(), right.dim()) != (dims, dims):
        return False
    rows, inner, columns = *left.shape[-2:], right.shape[-1]
    return bool(rows * inner * columns > REUSE * (rows * inner + inner * columns + rows * columns))


def _product(
    left: Tensor, right: Tensor, multiply: Callable[[Tensor, Tensor, Tensor, tuple[slice, slice]], object]
) -> Tensor:
    """[M, K] and [K, N] -> [M, N] in bf16, by ``multiply(left, right, out, where)`` on fp32 pieces of them."""
    rows, columns, inner = left.shape[0], right.shape[1], left.shape[1]
    by_rows = rows > columns
    whole = _wide("whole", right if by_rows else left)
    out = left.new_empty(rows, columns)
    step = max(MULTIPLE, PIECE // max(inner, min(rows, columns)) // MULTIPLE * MULTIPLE)
    for start in range(0, max(rows, columns), step):
        end = min(max(rows, columns), start + step)
        where = (slice(start, end), slice(None)) if by_rows else (slice(None), slice(start, end))
        piece = _wide("piece", left[start:end] if by_rows else right[:, start:end])
        made = _space("out", out[where].shape)
        multiply(*((piece, whole) if by_rows else (whole, piece)), made, where)
        out[where] = made
    return out


def _wide(place: str, tensor: Tensor) -> Tensor:
    """A copy in fp32, which lies as the tensor does: with its rows or its columns together."""
    turned = tensor.stride(-2) < tensor.stride(-1)
    plain = tensor.transpose(-2, -1) if turned else tensor
    copied = _space(place, plain.shape).copy_(plain)
    return copied.transpose(-2, -1) if turned else copied


def _space(place: str, shape: Sequence[int]) -> Tensor:
    """fp32 memory of this thread, of one of its three places; what was there before is no longer needed."""
    held: dict[str, Tensor] = vars(_kept)
    count = math.prod(shape)
    if place not in held or held[place].numel() < count:
        with torch.inference_mode(False):  # memory taken in inference mode could not be written outside of it
            held[place] = torch.empty(count)
    return held[place][:count].view(tuple(shape))
