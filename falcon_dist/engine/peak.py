"""What the processor can do at best, and how much of it a step does."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Final

import torch
from transformers import PreTrainedModel

from falcon_dist.config import Precision
from falcon_dist.engine.widened import multiplies_bf16

SIDE: Final = 2048
"""Side of the square product that is measured: operands of 8 MiB in bfloat16."""
WIDENED: Final = "this processor does not multiply bf16: products of bf16 matrices are computed in fp32 and rounded"
BUDGET_S: Final = 0.15
"""Seconds the measurement may take; two products are timed however long they take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gauge:
    """A rank's peak, and what a token of this model costs."""

    gflops: float
    flops_per_token: int

    def share(self, tokens: float, seconds: float) -> float:
        """What training so many tokens in this time is of the peak, 0 to 1."""
        return tokens * self.flops_per_token / seconds / self.gflops / 1e9


def gemm_gflops(dtype: torch.dtype, side: int = SIDE, budget_s: float = BUDGET_S) -> float:
    """Rate of a square product on this rank's threads, in GFLOP/s: the median after a first one that is not counted."""
    left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
    out = torch.mm(left, right)
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < budget_s:
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds) / 1e9


def multiplied_in(precision: Precision) -> torch.dtype:
    """What products of a run of this precision are computed in on this processor, see widened.py."""
    return torch.bfloat16 if precision != "fp32" and multiplies_bf16() else torch.float32


def step_flops(model: PreTrainedModel) -> int:
    """Floating-point operations a token of one training step: forward, and backward to activations and weights.

    Every matrix counts 2 a parameter and pass, a tied output layer once; the look-up of an untied input embedding
    and attention's own products count nothing, and frozen weights take no product of their own.
    """
    head, lookup = model.get_output_embeddings(), model.get_input_embeddings()
    untied = head is not None and head.weight is not lookup.weight
    matrices = [p for p in model.parameters() if p.ndim >= 2 and not (untied and p is lookup.weight)]
    return sum(p.numel() * (6 if p.requires_grad else 4) for p in matrices)


def gauge(model: PreTrainedModel, precision: Precision) -> tuple[Gauge, list[str]]:
    """Measures this rank's peak in the dtype it multiplies in; with lines for the person watching."""
    dtype = multiplied_in(precision)
    gflops, fp32 = gemm_gflops(dtype), dtype == torch.float32
    lines = [f"GEMM peak of a rank: {gflops:,.0f} GFLOP/s in {'fp32' if fp32 else 'bf16'}"]
    if fp32 and precision != "fp32":
        lines.append(WIDENED)
    if not fp32 and (warning := slow_bf16(gflops, gemm_gflops(torch.float32, SIDE // 2, 0.0))):
        lines.append(warning)
    return Gauge(gflops=gflops, flops_per_token=step_flops(model)), lines


def slow_bf16(bf16: float, fp32: float) -> str | None:
    """A line for the person where bfloat16 is no gain on this processor; rates in GFLOP/s."""
    if bf16 >= fp32:
        return None
    return (
        f"bf16 is slower than fp32 on this processor: {bf16:.0f} against {fp32:.0f} GFLOP/s; "
        "--set precision=fp32 is faster where its memory is there"
    )
