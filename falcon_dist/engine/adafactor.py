"""Adafactor for weights that are stepped inside backward: a factored second moment and stochastic rounding.

Shazeer and Stern 2018 (arXiv:1804.04235), without momentum, with a learning rate from outside. A matrix of [R, C]
keeps R + C fp32 numbers in the place of R x C; bf16 weights have no fp32 master: what a step would lose in
rounding is kept on average, by rounding up as often as the lost part is large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from falcon_dist.engine.named import NamedOptimizer
from falcon_dist.soundness import norm_of

BLOCK: Final = 1 << 18
"""Elements worked on at once: their fp32 copies stay in the cache of a core."""
NOISE: Final = 1 << 22
"""Random 16-bit numbers kept for rounding; each step of each parameter reads them from another place."""
DECAY: Final = 0.8
"""The second moment at step t forgets at the rate t ** -DECAY."""
EPS_SQUARE: Final = 1e-30
MAX_RMS: Final = 1.0
"""An update's root mean square is scaled down to this."""


class Adafactor(NamedOptimizer):
    """Steps one parameter at a time by ``step_one``, as soon as its gradient is there; ``step`` only counts.

    Args:
        params: groups as torch's optimizers take them.
        lr: learning rate; a scheduler may change it in the groups.
        weight_decay: decoupled, times lr.
        max_grad_norm: each parameter's gradient is scaled down to this norm before anything else; 0: never.
        seed: of the rounding; the same on every rank, or replicas would drift apart.
        agree: makes fp32 tensors those of rank 0, in place, where there are several ranks. Sums over a gradient differ
            in last bits between kinds of processors and numbers of threads; all else is done number by number.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        seed: int = 0,
        agree: Callable[[Sequence[Tensor]], None] = lambda _: None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.max_grad_norm = max_grad_norm
        self._squares = 0.0
        self._seed = seed
        self._agree = agree
        self._noise = _noise(seed)
        self._places = {
            param: (group, number)
            for number, (param, group) in enumerate((p, g) for g in self.param_groups for p in g["params"])
        }
        # Before any gradient: what stays must not lie where a gradient was, or the next one finds no room there.
        for param in self._places:
            self.state[param] = {
                kind: torch.zeros(shape, dtype=torch.float32) for kind, shape in state_shapes(param).items()
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """The step is over: every parameter was stepped within backward."""
        assert closure is None, "re-evaluating the loss is not supported"
        left = [param for param in self._places if param.grad is not None]
        assert not left, "a gradient is left that was not stepped"
        self.steps += 1
        self._squares = 0.0

    @property
    def norm(self) -> float:
        """Of all gradients of this step together, before clipping."""
        return math.sqrt(self._squares)

    @torch.no_grad()
    def step_one(self, param: Tensor, grad: Tensor) -> None:
        """Updates one parameter by its whole gradient.

        Raises:
            FloatingPointError: the gradient is not finite; the parameter is as it was.
        """
        group, number = self._places[param]
        matrix, slopes = _matrix(param), _matrix(grad)
        scale, rows, columns = self._sums(param, slopes)
        scale, keep = scale * group["lr"], 1.0 - group["lr"] * group["weight_decay"]
        dither = self._dither(number) if param.dtype == torch.bfloat16 else None
        for part, at, weights in _blocks(matrix):
            update = _scaled(slopes[part], rows, columns, part).mul_(scale)
            fresh = weights.float().mul_(keep).sub_(update)
            if dither is not None:
                round_stochastic_(fresh, _noise_at(self._noise, dither + at, fresh.numel()).view_as(fresh))
            weights.copy_(fresh)

    def _sums(self, param: Tensor, slopes: Tensor) -> tuple[float, Tensor | None, Tensor]:
        """All that is summed over a gradient, the same on every rank: the second moment's part, clipping included.

        Returns:
            A factor on the gradient, and one over the root of its second moment, as ``_roots`` has it.
        """
        shrink = self._shrink(slopes)
        state = self.state[param]
        _remember(slopes, shrink, state, 1.0 - (self.steps + 1) ** -DECAY)
        mean = float(state["row"].mean()) if "row" in state else 1.0
        size = _rms(slopes, *_roots(state, mean))
        told = torch.tensor([mean, shrink / max(1.0, size * shrink / MAX_RMS)], dtype=torch.float32)
        self._agree([*state.values(), told])
        mean, scale = told.tolist()
        return scale, *_roots(state, mean)

    def _shrink(self, slopes: Tensor) -> float:
        norm = float(norm_of([slopes]))  # in pieces: of a whole bf16 tensor the kernel makes an fp32 copy
        if not torch.isfinite(torch.tensor(norm)):
            raise FloatingPointError(f"the norm of a gradient is {norm}")
        self._squares += norm * norm
        return min(1.0, self.max_grad_norm / (norm + 1e-6)) if self.max_grad_norm else 1.0

    def _dither(self, number: int) -> int:
        """Where this step of this parameter reads its random numbers: a hash of (seed, step, parameter)."""
        mixed = (self._seed * 0x9E3779B97F4A7C15 + self.steps * 0xBF58476D1CE4E5B9 + number) & (2**64 - 1)
        mixed = ((mixed ^ (mixed >> 30)) * 0x94D049BB133111EB) & (2**64 - 1)
        return (mixed ^ (mixed >> 31)) % NOISE

    def load_named_state(self, names: Mapping[Tensor, str], state: Mapping[str, Tensor], steps: int) -> None:
        for param in self._places:
            self.state[param] = {kind: state[f"{kind}/{names[param]}"] for kind in state_shapes(param)}
        self.steps = steps


def state_shapes(param: Tensor) -> dict[str, tuple[int, ...]]:
    """What is kept of a parameter, all fp32."""
    if param.ndim < 2:
        return {"square": tuple(param.shape)}
    matrix = _matrix(param)
    return {"row": (matrix.shape[0],), "column": (matrix.shape[1],)}


def round_stochastic_(values: Tensor, noise: Tensor) -> None:
    """Makes fp32 values ones that bf16 holds, in place: up or down by chance, so that their mean stays.

    Args:
        values: fp32, finite.
        noise: int32 of the same shape, uniform over 0 to 65535.
    """
    bits = values.view(torch.int32)
    bits.add_(noise).bitwise_and_(-65536)


def _noise(seed: int) -> Tensor:
    """[NOISE + BLOCK] int16 bit patterns, ending as they begin."""
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(-32768, 32768, (NOISE,), dtype=torch.int16, generator=generator)
    return torch.cat([once, once[:BLOCK]])


def _noise_at(noise: Tensor, place: int, count: int) -> Tensor:
    start = place % NOISE
    if count > BLOCK:  # one row of a matrix wider than a block
        repeated = noise[:NOISE].roll(-start).repeat(-(-count // NOISE))
        return repeated[:count].to(torch.int32).add_(32768)
    return noise[start : start + count].to(torch.int32).add_(32768)


def _matrix(tensor: Tensor) -> Tensor:
    """[..., C] as [R, C]; a vector is one row."""
    return tensor.detach().reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.detach().reshape(1, 1)


def _blocks(matrix: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Rows of a matrix, as many as a block holds: their slice, the place of their first element, themselves."""
    rows = max(1, BLOCK // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        part = slice(start, start + rows)
        yield part, start * matrix.shape[1], matrix[part]


def _remember(slopes: Tensor, shrink: float, state: Mapping[str, Tensor], beta: float) -> None:
    """Takes a gradient into the second moment."""
    if "square" in state:
        squares = _copy(slopes).mul_(shrink).square_().add_(EPS_SQUARE)
        state["square"].lerp_(squares.view_as(state["square"]), 1.0 - beta)
        return
    rows = torch.empty(slopes.shape[0], dtype=torch.float32)
    columns = torch.zeros(slopes.shape[1], dtype=torch.float32)
    for part, _, grads in _blocks(slopes):
        squares = _copy(grads).square_()
        torch.mean(squares, dim=1, out=rows[part])
        columns += squares.sum(0)
    for kind, found in (("row", rows), ("column", columns.div_(slopes.shape[0]))):
        state[kind].lerp_(found.mul_(shrink * shrink).add_(EPS_SQUARE), 1.0 - beta)


def _roots(state: Mapping[str, Tensor], mean: float) -> tuple[Tensor | None, Tensor]:
    """1 / the second moment's root, as [R, 1] and [1, C] factors; a vector has no first one.

    Args:
        state: of a parameter.
        mean: of its rows.
    """
    if "square" in state:
        return None, state["square"].rsqrt().view(1, -1)
    return (state["row"] / mean).rsqrt_().unsqueeze(1), state["column"].rsqrt().unsqueeze(0)


def _copy(tensor: Tensor) -> Tensor:
    """fp32, to be worked on in place."""
    return tensor.to(torch.float32, copy=True)


def _scaled(grads: Tensor, rows: Tensor | None, columns: Tensor, part: slice) -> Tensor:
    """fp32 gradient over the root of its second moment."""
    scaled = _copy(grads).mul_(columns)
    return scaled if rows is None else scaled.mul_(rows[part])


def _rms(slopes: Tensor, rows: Tensor | None, columns: Tensor) -> float:
    """Root mean square of the scaled gradient."""
    total = 0.0
    square = columns.square().squeeze(0)
    for part, _, grads in _blocks(slopes):
        by_row = torch.mv(_copy(grads).square_(), square)
        total += float(by_row.sum() if rows is None else by_row.dot(rows[part].squeeze(1).square()))
    return float((total / slopes.numel()) ** 0.5)
