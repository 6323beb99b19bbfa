"""Numbers that are no longer finite stop the run before they reach the weights, and are traced to rank and rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.distributed as dist

from falcon_dist.contract import UnsoundError
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
        guilty = [rank for rank, sound in enumerate(self._gather(replay())) if not sound]
        places = "; ".join(map(self._place, guilty)) or "every rank's own gradients are finite, their sum is not"
        raise UnsoundError(f"gradient norm is {norm} at step {self.step}: {places}")

    def _gather(self, sound: bool) -> Sequence[bool]:
        if self._world.world_size == 1:
            return [sound]
        told = [torch.zeros(1) for _ in range(self._world.world_size)]
        dist.all_gather(told, torch.tensor([float(sound)]))
        return [bool(flag) for flag in told]

    def _place(self, rank: int) -> str:
        return f"rank {rank} had rows {self._schedule.rows_of_rank(self.step - 1, rank)}"


def gradient_norm(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm of all gradients: an fp32 scalar, never rounded to the gradients' dtype in between."""
    return norm_of([param.grad for param in parameters if param.grad is not None])


def norm_of(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same of gradients that are at hand."""
    flat = [gradient.reshape(-1) for gradient in gradients]
    pieces = [piece for gradient in flat for piece in gradient.split(PIECE)]  # type: ignore[no-untyped-call]
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float32) for piece in pieces]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
