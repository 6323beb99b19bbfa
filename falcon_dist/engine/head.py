"""The output layer and its loss in one go, in chunks of rows: the logits of a whole batch never exist.

Rows whose label is IGNORED are not multiplied at all. The gradient of the logits is known as soon as the logits
are (softmax minus one-hot), so forward makes the gradients too, as Liger's fused linear cross entropy does
(arXiv:2410.10989), and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from falcon_dist.engine import kernels
from falcon_dist.engine.linear import give_back, own_forward, weight_gradient
from falcon_dist.rows import IGNORED

CHUNK_BYTES: Final = 192 << 20
"""Logits held at once, in the dtype of the product."""
ROW_MULTIPLE: Final = 64
"""Chunks are filled up to a multiple of this: for every other shape oneDNN would generate kernels of its own."""
BLOCK_BYTES: Final = 2 << 20
"""fp32 logits worked on at once: a block that stays in the cache."""


class _Products(NamedTuple):
    loss: Tensor
    """fp32 scalar."""
    hidden: Tensor | None
    """[N, width] gradient."""
    weight: Tensor | None
    """[vocabulary, width] gradient."""
    bias: Tensor | None


class _HeadLoss(torch.autograd.Function):
    """sum over rows of cross entropy(hidden @ weight.T + bias, label), times a factor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: float) -> Tensor:
        made = _products(hidden, weight, bias, labels, factor, ctx.needs_input_grad)
        ctx.save_for_backward(made.hidden, made.weight, made.bias)
        return made.loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        made = ctx.saved_tensors
        if float(grad) != 1.0:
            made = [x if x is None else x * grad.to(x.dtype) for x in made]
        return *made, None, None


@torch.no_grad()
def _products(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: float, needed: tuple[bool, ...]
) -> _Products:
    rows = max(ROW_MULTIPLE, CHUNK_BYTES // (weight.shape[0] * weight.element_size()) // ROW_MULTIPLE * ROW_MULTIPLE)
    loss = torch.zeros((), dtype=torch.float32)
    of_hidden = torch.zeros_like(hidden) if needed[0] else None
    of_weight = _Sum(weight) if needed[1] else None
    of_bias = _Sum(bias) if bias is not None and needed[2] else None
    for places, wanted in _chunks(labels, rows):
        taken = hidden.index_select(0, places)
        logits = torch.nn.functional.linear(taken, weight, bias)
        loss += softmax_gradient_(logits, wanted, factor)
        if of_hidden is not None:
            count = int((wanted != IGNORED).sum())
            of_hidden.index_copy_(0, places[:count], (logits @ weight)[:count])
        if of_weight is not None:
            of_weight.add(weight_gradient(logits, taken))
        if of_bias is not None:
            of_bias.add(logits.sum(0, dtype=torch.float32))
    return _Products(
        loss, of_hidden, None if of_weight is None else of_weight.get(), None if of_bias is None else of_bias.get()
    )


class _Sum:
    """Adds up chunks in fp32; one chunk alone is taken as it is."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._total: Tensor | None = None

    def add(self, part: Tensor) -> None:
        self._total = part if self._total is None else self._total.float().add_(part)

    def get(self) -> Tensor:
        return torch.zeros_like(self._like) if self._total is None else self._total.to(self._like.dtype)


def _chunks(labels: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """[N] labels -> places of rows that carry loss, and their labels; the last chunk is filled up with IGNORED."""
    carrying = (labels != IGNORED).nonzero().squeeze(1)
    for at in range(0, len(carrying), rows):
        places = carrying[at : at + rows]
        missing = -len(places) % ROW_MULTIPLE
        wanted = torch.cat([labels[places], labels.new_full((missing,), IGNORED)])
        yield torch.cat([places, places.new_zeros(missing)]), wanted


def softmax_gradient_(logits: Tensor, labels: Tensor, factor: float) -> Tensor:
    """Turns [N, V] logits into the gradient of ``factor`` x the summed loss, in place; returns that loss (fp32).

    Rows labelled IGNORED count nothing and become 0.
    """
    losses = kernels.softmax_gradient_(logits, labels, factor)
    if losses is not None:
        return losses.sum() * factor
    rows = max(1, BLOCK_BYTES // (4 * logits.shape[1]))
    starts = range(0, len(logits), rows)
    sums = [_block_(logits[at : at + rows], labels[at : at + rows], factor) for at in starts]
    return torch.stack(sums).sum() * factor


def _block_(logits: Tensor, labels: Tensor, factor: float) -> Tensor:
    counted = labels != IGNORED
    wanted = labels.clamp(min=0).unsqueeze(1)
    logs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    losses = logs.gather(1, wanted).squeeze(1).neg() * counted
    weights = (counted.float() * factor).unsqueeze(1)
    gradient = logs.exp_().mul_(weights).scatter_add_(1, wanted, -weights)
    logits.copy_(gradient)
    return losses.sum()


class LossHead:
    """Stands in for a model's output layer: asked for a loss, the layer gives it where its logits would be.

    The layer keeps its place, parameters and hooks, so DDP, DeepSpeed and checkpoints see it as it is.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._plain, self._before = layer.forward, own_forward(layer)
        self._asked: tuple[Tensor, float] | None = None
        layer.forward = self._forward  # type: ignore[assignment,method-assign]

    @contextmanager
    def asked(self, labels: Tensor, factor: float) -> Iterator[None]:
        """In the block the layer returns ``factor`` x the loss summed over [B, T] ``labels``, shifted by one."""
        self._asked = labels, factor
        try:
            yield
        finally:
            self._asked = None

    def remove(self) -> None:
        """Gives the layer back what forward it had."""
        give_back(self._layer, self._before)

    def _forward(self, hidden: Tensor) -> Tensor:
        if self._asked is None:
            return self._plain(hidden)
        labels, factor = self._asked
        return head_loss(hidden, self._layer.weight, self._layer.bias, labels, factor)


def head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: float = 1.0) -> Tensor:
    """``factor`` x the summed next-token loss of an output layer: an fp32 scalar.

    Args:
        hidden: [B, T, width] states before the layer.
        weight: [vocabulary, width].
        bias: [vocabulary] or None.
        labels: [B, T] int64; position t is judged by labels[:, t + 1], and not where that is IGNORED.
        factor: one over the tokens of the global batch, and the like; it must not need a gradient.
    """
    ahead = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    flat = hidden.flatten(0, -2)
    if torch.is_autocast_enabled("cpu"):
        flat, weight, bias = _autocast(flat), _autocast(weight), None if bias is None else _autocast(bias)
    with torch.autocast("cpu", enabled=False):
        loss: Tensor = _HeadLoss.apply(flat, weight, bias, ahead, factor)  # type: ignore[no-untyped-call]
    return loss


def _autocast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_autocast_dtype("cpu"))
