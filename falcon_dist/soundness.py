"""Numbers that are no longer finite stop the run before they reach the weights, and are traced to rank and rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.distributed as dist

from falcon_dist.contract import UnsoundError
from falcon_dist.engine import kernels
from falcon_dist.order import Schedule
from falcon_dist.world import World

PIECE: Final = 1 << 18
"""Elements of a gradient whose fp32 copy stays in the cache."""


class Soundness:
    """Knows which rows each rank has in the step that is being taken."""

    def __init__(self, schedule: Schedule, world: World, start: int) -> None:
        self._schedule = schedule
        self._world = world
        self.step = start
        """From 1; the step that is being taken."""

    def check_loss(self, loss: torch.Tensor) -> None:
        """Raises UnsoundError where this rank's loss is not finite; its peers are stopped by the launcher."""
        if not math.isfinite(value := float(loss.detach())):
            raise UnsoundError(f"loss is {value} at step {self.step}: {self._place(self._world.rank)}")

    def check_norm(self, norm: float, replay: Callable[[], bool]) -> None:
        """Raises UnsoundError where the gradients' norm over all ranks is not finite.

        ``replay`` computes this rank's gradients again, alone, and tells whether they are finite. All ranks see the
        same norm, so all come here together.
        """
        if math.isfinite(norm):
            return
        guilty = [rank for rank, sound in enumerate(self._gather(float(replay()))) if not sound]
        places = "; ".join(map(self._place, guilty)) or "every rank's own gradients are finite, their sum is not"
        raise UnsoundError(f"gradient norm is {norm} at step {self.step}: {places}")

    def agreed(self, norm: torch.Tensor) -> torch.Tensor:
        """The fp32 norm that all ranks clip by: rank 0's, or one that is not finite; to be called by all ranks.

        Each rank has summed the same gradients, but processors of other kinds sum in other orders: norms of their own,
        apart by a last bit, would take the ranks' weights apart.
        """
        told = self._gather(float(norm))
        return torch.tensor(next((x for x in told if not math.isfinite(x)), told[0]), dtype=torch.float32)

    def _gather(self, mine: float) -> list[float]:
        """What each rank says, an fp32 number."""
        if self._world.world_size == 1:
            return [mine]
        told = [torch.zeros(1, dtype=torch.float32) for _ in range(self._world.world_size)]
        dist.all_gather(told, torch.tensor([mine], dtype=torch.float32))
        return [float(number) for number in told]

    def _place(self, rank: int) -> str:
        return f"rank {rank} had rows {self._schedule.rows_of_rank(self.step - 1, rank)}"


def gradient_norm(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of all gradients: an fp32 scalar, never rounded to the gradients' dtype in between."""
    return norm_of([param.grad for param in parameters if param.grad is not None])


def norm_of(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same of gradients that are at hand."""
    total = math.fsum(_square_sum(gradient.reshape(-1)) for gradient in gradients)
    return torch.tensor(total, dtype=torch.float32).sqrt()


def _square_sum(flat: torch.Tensor) -> float:
    if (found := kernels.square_sum(flat)) is not None:
        return found
    pieces = flat.split(PIECE)  # type: ignore[no-untyped-call]
    return math.fsum(float(torch.linalg.vector_norm(piece, dtype=torch.float32)) ** 2 for piece in pieces)
