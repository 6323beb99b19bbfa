"""Whole SFTTrainer steps: ours, stock transformers, and the 2023 recipe's stack, each with several allocators.

    python benchmarks/step.py [--shape falcon-80m|falcon-160m|demo] [--strategy ddp|lora] [--ipex-python PATH]
                              [--rows 4] [--tokens 512] [--threads 2] [--rounds 5] [--minutes 6]
                              [--ways ours,stock,2023,2023-plain]
                              [--allocators stock,glibc,glibc-huge,tcmalloc,jemalloc]

Every contender is a process of its own, for an allocator is chosen before a program starts; between its turns it
waits. In a round each of them takes --steps steps, in an order that turns from round to round, and a 4096^3 bfloat16
product is timed before and after each round. A figure is the median over rounds; no round begins that would end after
--minutes. gemm_share counts 6 operations a trained parameter and token, 4 a frozen one, the output layer's product
included, attention's own products left out, and what ours does not do for rows without loss is not taken off.

ours: bf16 weights, fp32 masters, segment attention, chunked head. stock: fp32 weights under bf16 autocast, fused
AdamW, transformers' own loss over sdpa with the packed mask; ours-fp32 and stock-fp32: the same all in fp32, for
processors that do not multiply bf16, on which the peak is that of fp32 too. 2023 and 2023-plain: see step_2023.py,
with its TRL's loss and with transformers' own; they need --ipex-python, the Python of `make bench-venv`, and have no
adapters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from step_rows import SHAPES

WARM_UP: Final = 2
HERE: Final = Path(__file__).resolve().parent
OLD: Final = {"2023": "trl", "2023-plain": "plain"}
"""Contenders of the 2023 stack and their loss."""


def main() -> int:
    """Starts the contenders, lets them take turns, and tells."""
    flags = parse()
    began = time.monotonic()
    contenders = start(flags)
    flops = [one.told().get("flops_per_token") for one in contenders]
    for one in contenders:
        one.take(WARM_UP)
    seconds, gemm = take_turns(flags, contenders, began)
    for one in contenders:
        one.end()
    tell(flags, next(filter(None, flops)), seconds, gemm)
    return 0


def parse() -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="falcon-80m")
    parser.add_argument("--strategy", choices=("ddp", "lora"), default="ddp")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of one contender in a round")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--ipex-python", type=Path)
    parser.add_argument("--ways", help="default: ours,stock, and 2023 where --ipex-python is given")
    parser.add_argument("--allocators", default="stock,glibc")
    flags = parser.parse_args()
    flags.ways = (flags.ways or ("ours,stock,2023" if flags.ipex_python else "ours,stock")).split(",")
    flags.allocators = flags.allocators.split(",")
    if unknown := {*flags.ways} - {"ours", "ours-fp32", "stock", "stock-fp32", *OLD}:
        parser.error(f"--ways: no such contender: {', '.join(sorted(unknown))}")
    if OLD.keys() & {*flags.ways} and (flags.ipex_python is None or flags.strategy == "lora"):
        parser.error("--ways: 2023 needs --ipex-python, and has no adapters")
    return flags


def start(flags: argparse.Namespace) -> list[Contender]:
    """Every way with every allocator."""
    pairs = [(way, allocator) for way in flags.ways for allocator in flags.allocators]
    return [Contender(f"{way}/{allocator}", words(flags, way), allocator, flags.threads) for way, allocator in pairs]


def words(flags: argparse.Namespace, way: str) -> list[str]:
    """The command of a contender."""
    sizes = [flags.shape, *map(str, (flags.rows, flags.tokens, flags.threads))]
    if way in OLD:
        return [str(flags.ipex_python), str(HERE / "step_2023.py"), OLD[way], *sizes]
    return [sys.executable, str(HERE / "step_trainers.py"), way, flags.strategy, *sizes]


class Contender:
    """A process that takes steps when it is told to."""

    def __init__(self, name: str, words: list[str], allocator: str, threads: int) -> None:
        self.name = name
        env = {**os.environ, **allocation(allocator), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def told(self) -> dict[str, Any]:
        """The next line of JSON that it says."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"'):
                return dict(json.loads(line))
        sys.exit(f"{self.name} ended with {self._process.wait()}")

    def take(self, steps: int) -> float:
        """Seconds a step."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return float(self.told()["seconds"]) / steps

    def end(self) -> None:
        """Lets it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def allocation(name: str) -> Mapping[str, str]:
    """What the launcher would give a rank for this allocator; stock: nothing; glibc-huge: huge pages besides."""
    from launcher.environment import GLIBC_TUNED
    from launcher.hello import allocators

    if name == "stock":
        return {}
    if name == "glibc-huge":
        return {key: f"{value}:glibc.malloc.hugetlb=1" for key, value in GLIBC_TUNED.items()}
    return GLIBC_TUNED if name == "glibc" else {"LD_PRELOAD": allocators()[name]}


def take_turns(
    flags: argparse.Namespace, contenders: list[Contender], began: float
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds a step of each contender in each round, and the rate of the product around the rounds."""
    import torch

    from falcon_dist.engine.peak import gemm_gflops, multiplied_in

    torch.set_num_threads(flags.threads)
    seconds: dict[str, list[float]] = {one.name: [] for one in contenders}
    gemm = [gemm_gflops(multiplied_in("bf16"), 4096)]
    for turn in range(flags.rounds):
        turn_began = time.monotonic()
        first = turn % len(contenders)
        for one in contenders[first:] + contenders[:first]:
            seconds[one.name].append(one.take(flags.steps))
        gemm.append(gemm_gflops(multiplied_in("bf16"), 4096))
        if 2 * time.monotonic() - turn_began - began > 60 * flags.minutes:
            break
    return seconds, gemm


def tell(flags: argparse.Namespace, flops: int, seconds: Mapping[str, list[float]], gemm: list[float]) -> None:
    """The table and the JSON line."""
    tokens, peak = flags.rows * flags.tokens, statistics.median(gemm)
    rates = {name: tokens / statistics.median(taken) for name, taken in seconds.items()}
    shares = {name: rate * flops / peak / 1e9 for name, rate in rates.items()}
    print(f"{'contender':<16}{'step s':>9}{'from':>8}{'to':>8}{'tokens/s':>10}{'GEMM share':>12}")
    for name, taken in seconds.items():
        told = f"{rates[name]:>10.0f}{shares[name]:>12.3f}"
        print(f"{name:<16}{statistics.median(taken):>9.3f}{min(taken):>8.3f}{max(taken):>8.3f}{told}")
    ours = {name: rate for name, rate in rates.items() if name.startswith("ours/")}
    best = max(ours, key=lambda name: ours[name], default=None)
    facts = {
        "shape": {"name": flags.shape, **SHAPES[flags.shape]},
        **{key: getattr(flags, key) for key in ("strategy", "rows", "tokens", "threads", "steps")},
        "flops_per_token": flops,
        "tokens_per_s": {name: round(rate, 1) for name, rate in rates.items()},
        "gemm_gflops": [round(rate) for rate in gemm],
        "gemm_share": {name: round(share, 4) for name, share in shares.items()},
        "times_as_fast": {name: round(ours[best] / rate, 3) for name, rate in rates.items()} if best else {},
        "step_s": {name: [round(x, 4) for x in taken] for name, taken in seconds.items()},
    }
    print(json.dumps(facts | surroundings()))


def surroundings() -> dict[str, object]:
    """What the figures belong to."""
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    sys.exit(main())
