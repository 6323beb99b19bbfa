"""Held-out loss and perplexity, with the error that so few records leave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from falcon_dist.config import Precision
from falcon_dist.loss import token_losses
from falcon_dist.masking import Masking
from falcon_dist.rows import IGNORED, Part
from falcon_dist.team import Team
from falcon_dist.world import World


def perplexity_of(loss: float) -> float:
    """e to the loss, infinite where that is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Loss over the held-out rows, in nats a token."""

    loss: float
    standard_error: float
    """Of ``loss``, over records: tokens of one record are no independent witnesses."""
    tokens: int
    records: int

    @property
    def perplexity(self) -> float:
        return perplexity_of(self.loss)

    def as_dict(self) -> dict[str, Any]:
        """For result.json and base.json; JSON has no word for infinity, so such a perplexity is null."""
        return {
            "loss": self.loss,
            "standard_error": self.standard_error,
            "tokens": self.tokens,
            "records": self.records,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeldOut:
        return cls(**{k: values[k] for k in ("loss", "standard_error", "tokens", "records")})

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} +- {self.standard_error:.4f}, perplexity {self.perplexity:.2f} "
            f"({self.tokens:,} tokens of {self.records} records)"
        )


@torch.no_grad()
def held_out(
    model: PreTrainedModel, part: Part, world: World, precision: Precision, team: Team | None = None
) -> HeldOut:
    """Every held-out row once, shared out over the ranks of the open process group; in a run they are ``team``."""
    was_training = model.training
    model.eval()
    records = int(part.records.max()) + 1 if len(part) else 0
    sums = torch.zeros(2, records, dtype=torch.float64)
    masking = Masking.of(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-autocast"):
        for row in range(world.rank, len(part), world.world_size):
            _add_row(model, part.batch([row]), masking, sums)
            if team:
                team.get_on()
    if team:
        team.meet(world.world_size)
    dist.all_reduce(sums)
    model.train(was_training)
    return ratio(sums[0], sums[1])


def _add_row(model: PreTrainedModel, batch: dict[str, torch.Tensor], masking: Masking, sums: torch.Tensor) -> None:
    records, labels = batch["records"], batch["labels"]
    logits = model(input_ids=batch["input_ids"], use_cache=False, **masking.inputs(records)).logits
    counted = labels[:, 1:] != IGNORED
    owners = records[:, 1:][counted]
    sums[0].index_add_(0, owners, token_losses(logits, labels)[counted].double())
    sums[1].index_add_(0, owners, torch.ones(len(owners), dtype=torch.float64))


def ratio(losses: torch.Tensor, tokens: torch.Tensor) -> HeldOut:
    """[R] summed loss and [R] tokens of each record -> loss a token and its standard error.

    The error is that of a ratio estimator over clusters (Cochran, "Sampling Techniques", 1977, 6.4).
    """
    seen = tokens > 0
    losses, tokens = losses[seen], tokens[seen]
    records, total = len(tokens), float(tokens.sum())
    mean = float(losses.sum()) / total
    spread = float(((losses - mean * tokens) ** 2).sum())
    error = math.sqrt(spread * records / max(records - 1, 1)) / total
    return HeldOut(loss=mean, standard_error=error, tokens=int(total), records=records)
