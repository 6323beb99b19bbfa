"""all_reduce over ccl against gloo and a plain copy, on this host: a table and one JSON line.

    python benchmarks/allreduce.py [--ranks 2] [--rounds 3] [--quick]

Starts its own ranks, each pinned to one allowed cpu. Within a round the backends take turns call by call,
so that other load on the machine meets both alike; a figure is the median over rounds of medians over calls.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

RANK_TIMEOUT_S: Final = 900
KIB: Final = 1024
MIB: Final = 1024 * KIB


@dataclass(frozen=True)
class Case:
    """One row: bytes per rank and dtype."""

    size: int
    dtype: str

    @property
    def name(self) -> str:
        """For example "4MiB bfloat16"."""
        text = f"{self.size // MIB}MiB" if self.size >= MIB else f"{self.size // KIB}KiB"
        return f"{text} {self.dtype}"

    @property
    def calls(self) -> int:
        """Calls per round: many of the short ones."""
        return max(5, min(200, 32 * MIB // self.size))


CASES: Final = (
    Case(4 * KIB, "float32"),
    Case(64 * KIB, "float32"),
    Case(256 * KIB, "float32"),
    Case(4 * MIB, "float32"),
    Case(32 * MIB, "float32"),
    Case(64 * MIB, "float32"),
    Case(128 * MIB, "float32"),
    Case(4 * KIB, "bfloat16"),
    Case(2 * MIB, "bfloat16"),
    Case(16 * MIB, "bfloat16"),
    Case(64 * MIB, "bfloat16"),
)
QUICK: Final = (CASES[0], CASES[5], CASES[10])
TARGETS: Final = {"4KiB float32": 6.0, "64MiB float32": 2.0, "64MiB bfloat16": 4.0}
"""Least wanted ratio of gloo's time to ccl's, two ranks on two cores."""


def main() -> int:
    """Starts the ranks, or is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="only the sizes that have a target")
    flags = parser.parse_args()
    if "RANK" in os.environ:
        measure(flags.rounds, QUICK if flags.quick else CASES)
        return 0
    return start(flags.ranks)


def start(ranks: int) -> int:
    """Runs this script once per rank and returns the first bad exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cpus = sorted(os.sched_getaffinity(0))
    children = []
    for rank in range(ranks):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "BENCHMARK_CPU": str(cpus[rank % len(cpus)]),
        }
        children.append(subprocess.Popen([sys.executable, *sys.argv], env=env))
    try:
        codes = [child.wait(timeout=RANK_TIMEOUT_S) for child in children]
    finally:
        for child in children:
            child.kill()
    return next((code for code in codes if code), 0)


def measure(rounds: int, cases: tuple[Case, ...]) -> None:
    """One rank: every case, rounds of alternating calls; rank 0 prints."""
    os.sched_setaffinity(0, {int(os.environ["BENCHMARK_CPU"])})
    import torch
    import torch.distributed as dist

    import falcon_dist.ccl  # noqa: F401

    dist.init_process_group("ccl")
    gloo = dist.new_group(backend="gloo")
    first = dist.get_rank() == 0
    rows = []
    if first:
        print(f"{'size dtype':<18}{'gloo ms':>10}{'ccl ms':>10}{'copy ms':>10}{'gloo/ccl':>10}{'ccl/copy':>10}")
    for case in cases:
        dtype = getattr(torch, case.dtype)
        data = torch.zeros(case.size // dtype.itemsize, dtype=dtype)
        other = torch.ones_like(data)
        actions: dict[str, Callable[[], Any]] = {
            "gloo": lambda data=data: dist.all_reduce(data, group=gloo),
            "ccl": lambda data=data: dist.all_reduce(data),
            "copy": lambda data=data, other=other: other.copy_(data),
        }
        times = {
            name: statistics.median(found) for name, found in _rounds(actions, rounds, case.calls, dist.barrier).items()
        }
        rows.append(_row(case, times))
        if first:
            print(_line(rows[-1]), flush=True)
    if first:
        print(json.dumps({"ranks": dist.get_world_size(), "rounds": rounds, "cases": rows}), flush=True)
    dist.destroy_process_group()


def _rounds(
    actions: dict[str, Callable[[], Any]], rounds: int, calls: int, barrier: Callable[[], Any]
) -> dict[str, list[float]]:
    """Milliseconds: per action one median for each round."""
    for action in actions.values():
        action()
    medians: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        found: dict[str, list[float]] = {name: [] for name in actions}
        for _ in range(calls):
            for name, action in actions.items():
                barrier()
                started = time.perf_counter()
                action()
                found[name].append((time.perf_counter() - started) * 1e3)
        for name, values in found.items():
            medians[name].append(statistics.median(values))
    return medians


def _row(case: Case, ms: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "bytes": case.size}
    row |= {f"{name}_ms": round(value, 4) for name, value in ms.items()}
    row |= {"speedup": round(ms["gloo"] / ms["ccl"], 2), "copies": round(ms["ccl"] / ms["copy"], 2)}
    if case.name in TARGETS and os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        row |= {"target": TARGETS[case.name], "met": ms["gloo"] / ms["ccl"] >= TARGETS[case.name]}
    return row


def _line(row: dict[str, Any]) -> str:
    figures = (row["gloo_ms"], row["ccl_ms"], row["copy_ms"], row["speedup"], row["copies"])
    target = f"   target {row['target']}: {'met' if row['met'] else 'MISSED'}" if "target" in row else ""
    return f"{row['case']:<18}" + "".join(f"{figure:>10.3f}" for figure in figures) + target


if __name__ == "__main__":
    sys.exit(main())
