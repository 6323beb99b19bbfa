"""Bytes a rank needs, told before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from falcon_dist.config import Precision

_WEIGHT_BYTES: dict[Precision, int] = {"bf16": 2, "bf16-autocast": 4, "fp32": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes of one rank's training state; activations come on top."""

    weights: int
    gradients: int
    optimizer: int
    """Two fp32 moments, and an fp32 master copy where the weights are bf16."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def replicated(parameters: int, precision: Precision) -> RankMemory:
    """State of plain data parallelism, where every rank holds all of it."""
    weight = _WEIGHT_BYTES[precision]
    master = 0 if weight == 4 else 4
    return RankMemory(weights=parameters * weight, gradients=parameters * weight, optimizer=parameters * (8 + master))
