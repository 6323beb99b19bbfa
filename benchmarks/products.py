"""Products of bf16 matrices as layers need them: torch's own, widened to fp32 (engine/widened.py), and fp32's own.

    python benchmarks/products.py [--threads 2] [--rounds 5]

The three take turns; a figure is the median rate over rounds, in GFLOP/s. On processors with AVX-512 torch's own are
oneDNN's, and widened ones are not used. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from falcon_dist.engine import widened

SIZES: Final = {
    "one token": (1, 576, 1536),
    "16 tokens": (16, 576, 1536),
    "LoRA, to rank 8": (512, 576, 8),
    "LoRA, from rank 8": (512, 8, 576),
    "demo, MLP": (512, 576, 1536),
    "demo, head": (256, 576, 49152),
    "Falcon-7B, 128 tokens": (128, 4544, 4544),
}
"""Tokens, input and output width of a layer."""
SLOWEST_S: Final = 20.0
"""A product that takes longer is timed once."""


def main() -> None:
    """Times every size in forward, for its input's gradient and for its weight's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    found = {}
    print(f"{'layer':<24}{'product':<10}{'bf16':>8}{'widened':>9}{'fp32':>8}")
    for name, sizes in SIZES.items():
        for form, left, right in operands(*sizes):
            wide = left.float(), right.float()
            ways = (lambda: left @ right, lambda: widened.mm(left, right), lambda: wide[0] @ wide[1])  # noqa: B023
            rates = in_turns(ways, 2e-9 * sizes[0] * sizes[1] * sizes[2], flags.rounds)
            print(f"{name:<24}{form:<10}{rates[0]:>8.1f}{rates[1]:>9.1f}{rates[2]:>8.1f}", flush=True)
            found[f"{name}/{form}"] = [round(rate, 1) for rate in rates]
    print(json.dumps({"threads": flags.threads, "bf16_by_onednn": widened.multiplies_bf16(), "gflops": found}))


def operands(tokens: int, inner: int, outer: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The three products of a layer, with the layouts they have in training."""
    x, weight, grad = (torch.randn(shape).bfloat16() for shape in ((tokens, inner), (outer, inner), (tokens, outer)))
    yield "forward", x, weight.t()
    yield "of input", grad, weight
    yield "of weight", grad.t(), x


def in_turns(ways: tuple[Callable[[], object], ...], gflop: float, rounds: int) -> list[float]:
    """The median rate of each, after a turn that is not counted."""
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for way, taken in zip(ways, seconds, strict=True):
            if not taken or taken[0] < SLOWEST_S:
                began = time.perf_counter()
                way()
                taken.append(time.perf_counter() - began)
    return [gflop / statistics.median(taken[1:] or taken) for taken in seconds]


if __name__ == "__main__":
    main()
