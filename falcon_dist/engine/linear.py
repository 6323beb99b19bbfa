"""Linear layers whose weight gradient is multiplied from transposed copies.

With AMX oneDNN takes a product whose first operand is transposed at half the rate of others, for it transposes that
operand itself, slowly (docs/engine.md). A kernel that torch.compile generates does it in a fifth of the time. Where
there is no C++ compiler for that, torch's own copy is taken where it still pays. Without AMX the plain product is the
fastest.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)

SMALLEST: Final = 1024
"""Narrower layers, and fewer rows than an eighth of it, gain little: a run of small ones ends before it has paid for
the ten seconds that generating the kernel takes."""


class _Linear(torch.autograd.Function):
    """[..., K] @ [N, K].T"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        of_x = grad @ weight if ctx.needs_input_grad[0] else None
        flat = grad.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
        return of_x, weight_gradient(*flat) if ctx.needs_input_grad[1] else None


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """``grad.T @ x``, contiguous: [T, N] gradient of the output and [T, K] input -> [N, K]."""
    (rows, width), inner = grad.shape, x.shape[1]
    if not has_tiles() or min(width, inner, 8 * rows) < SMALLEST or x.dtype != torch.bfloat16:
        return grad.t() @ x
    transposed = _transposed()
    if transposed is None:
        return (grad.t().contiguous() if width < inner else grad.t()) @ x
    if 2 * rows * width > 3 * inner * (rows + width):  # the copies of input and result are much smaller
        return transposed(transposed(x.contiguous()) @ grad)  # type: ignore[no-any-return]
    return transposed(grad.contiguous()) @ x  # type: ignore[no-any-return]


@cache
def _transposed() -> Any:
    """One kernel for all shapes and numbers of threads; None where there is no compiler, or none whose work can be kept
    and run.
    """
    if shutil.which("g++") is None:
        return None
    made = torch.compile(lambda matrix: matrix.t().contiguous(), dynamic=True, options={"cpp.dynamic_threads": True})
    try:
        made(torch.zeros(48, 32, dtype=torch.bfloat16))
    except (RuntimeError, OSError) as fault:
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
        _log.warning("weight gradients are slower here, for torch.compile gives no kernel: %s", reason)
        return None
    return made


def has_tiles() -> bool:
    """Whether this processor multiplies by AMX."""
    return bool(torch.cpu._is_amx_tile_supported())


def trained_layers(model: nn.Module, head: nn.Module | None) -> Iterator[nn.Linear]:
    """Layers that gain: on AMX those that are wide, without bias, with bf16 weights that are trained and whole."""
    for layer in model.modules() if has_tiles() else ():
        if isinstance(layer, nn.Linear) and layer is not head and layer.bias is None:
            weight = layer.weight
            partitioned = hasattr(weight, "ds_id")  # ZeRO-3 takes weights away between forward and backward
            fits = min(weight.shape) >= SMALLEST and weight.dtype == torch.bfloat16
            if weight.requires_grad and fits and not partitioned:
                yield layer


class FastLayers:
    """Layers with their forward replaced, until ``remove``; their place, parameters and hooks are kept."""

    def __init__(self, layers: Iterator[nn.Linear]) -> None:
        self._layers = list(layers)
        self._before = [own_forward(layer) for layer in self._layers]
        for layer in self._layers:
            layer.forward = _forward_of(layer)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Gives each layer back what forward it had."""
        for layer, before in zip(self._layers, self._before, strict=True):
            give_back(layer, before)


def own_forward(layer: nn.Module) -> Any:
    """The forward that was given to this very layer, or None: it has that of its class."""
    return vars(layer).get("forward")


def give_back(layer: nn.Module, before: Any) -> None:
    """Undoes an assignment to ``layer.forward``; ``before`` is what ``own_forward`` said then."""
    if before is None:
        del layer.forward
    else:
        layer.forward = before


def _forward_of(layer: nn.Linear) -> Any:
    def forward(x: Tensor) -> Tensor:
        made: Tensor = _Linear.apply(x, layer.weight)  # type: ignore[no-untyped-call]
        return made

    return forward
