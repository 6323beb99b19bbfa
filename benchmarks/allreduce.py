"""all_reduce over ccl against gloo and a plain copy: a table and one JSON line.

    python benchmarks/allreduce.py [--ranks 2] [--rounds 3] [--quick] [--imb]     on this host
    python benchmarks/allreduce.py --two-hosts [--rounds 3] [--quick]             two hosts made here (root), over TCP

Starts its own ranks, each pinned to one allowed cpu. Within a round the backends take turns call by call,
so that other load on the machine meets both alike; a figure is the median over rounds of medians over calls.
--imb adds Intel MPI's own benchmark (IMB Allreduce, float32), run between the rounds on the same cpus while the ranks
sleep. The hosts of --two-hosts are those of tests/cluster: see make test-cluster for what they need.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
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
BETWEEN_HOSTS: Final = {"4KiB float32": 3.0, "64MiB bfloat16": 1.2}
"""The same between two hosts; any other size is wanted to be at least ``LEAST_BETWEEN_HOSTS``."""
LEAST_BETWEEN_HOSTS: Final = 0.95
IMB_FROM: Final = 4 * MIB
"""From here on ccl is wanted to be no slower than Intel MPI."""
PORT: Final = 29500


def main() -> int:
    """Starts the ranks, or is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="only the sizes that have a target")
    parser.add_argument("--imb", action="store_true", help="compare with Intel MPI too")
    parser.add_argument("--two-hosts", action="store_true", help="one rank on each of two hosts made here")
    flags = parser.parse_args()
    if "RANK" in os.environ:
        measure(flags.rounds, QUICK if flags.quick else CASES, imb=flags.imb)
        return 0
    return on_two_hosts() if flags.two_hosts else start(flags.ranks)


def start(ranks: int, timeout_s: float = RANK_TIMEOUT_S) -> int:
    """Runs this script once per rank and returns the first bad exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    envs = [_environment(rank, ranks, ranks, "127.0.0.1", port) for rank in range(ranks)]
    return _first_fault([subprocess.Popen([sys.executable, *sys.argv], env=env) for env in envs], timeout_s)


def on_two_hosts() -> int:
    """The same with each of two ranks on a host of its own."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from cluster.hosts import Hosts

    with tempfile.TemporaryDirectory() as folder, Hosts(2, Path(folder) / "c") as hosts:
        words = [sys.executable, str(Path(__file__).absolute()), *sys.argv[1:]]
        envs = [
            _environment(rank, 2, 1, hosts[0].address, PORT) | {"GLOO_SOCKET_IFNAME": "eth0", "FI_TCP_IFACE": "eth0"}
            for rank in (0, 1)
        ]
        return _first_fault(
            [hosts[rank].enter(*words, env=env, stdout=None, stderr=None) for rank, env in enumerate(envs)]
        )


def _environment(rank: int, ranks: int, local_size: int, addr: str, port: int) -> dict[str, str]:
    cpus = sorted(os.sched_getaffinity(0))
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % local_size),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": addr,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "BENCHMARK_CPU": str(cpus[rank % len(cpus)]),
    }


def _first_fault(children: Sequence[subprocess.Popen[Any]], timeout_s: float = RANK_TIMEOUT_S) -> int:
    try:
        codes = [child.wait(timeout=timeout_s) for child in children]
    finally:
        for child in children:
            child.kill()
    return next((code for code in codes if code), 0)


def measure(rounds: int, cases: tuple[Case, ...], *, imb: bool = False) -> None:
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
        found: dict[str, list[float]] = {name: [] for name in actions}
        compared = imb and case.dtype == "float32"
        for turn in range(rounds):
            for name, value in _round(actions, case.calls, dist.barrier).items():
                found[name].append(value)
            if compared and first:
                found.setdefault("imb", []).append(imb_allreduce(case.size, dist.get_world_size()))
            if compared:
                _sleep_until_told(f"imb/{case.name}/{turn}", tell=first)
        rows.append(_row(case, {name: statistics.median(values) for name, values in found.items()}))
        if first:
            print(_line(rows[-1]), flush=True)
    if first:
        hosts = dist.get_world_size() // int(os.environ["LOCAL_WORLD_SIZE"])
        told = {"ranks": dist.get_world_size(), "hosts": hosts, "rounds": rounds, "load": os.getloadavg()[0]}
        print(json.dumps(told | {"cases": rows}), flush=True)
    dist.destroy_process_group()


def _round(actions: dict[str, Callable[[], Any]], calls: int, barrier: Callable[[], Any]) -> dict[str, float]:
    """Median milliseconds of each action, the actions taking turns."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(calls):
        for name, action in actions.items():
            barrier()
            started = time.perf_counter()
            action()
            found[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in found.items()}


def _sleep_until_told(key: str, *, tell: bool) -> None:
    """A barrier in which nobody polls."""
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    if tell:
        store.set(key, "done")
    store.wait([key])


def imb_allreduce(size: int, ranks: int) -> float:
    """Milliseconds of Intel MPI's all_reduce, as its benchmark averages them."""
    from falcon_dist.ccl_library import find_library

    root = find_library().folder.parent
    cpus = sorted(os.sched_getaffinity(os.getppid()))
    env = os.environ | {
        "I_MPI_ROOT": str(root),
        "FI_PROVIDER_PATH": str(root / "lib"),
        "LD_LIBRARY_PATH": f"{root}/lib",
    }
    env = {name: value for name, value in env.items() if not name.startswith(("CCL_", "FI_TCP", "RANK", "WORLD"))}
    env |= {"FI_PROVIDER": "shm", "I_MPI_PIN_PROCESSOR_LIST": ",".join(str(cpus[n % len(cpus)]) for n in range(ranks))}
    argv = [str(root / "bin" / "mpiexec.hydra"), "-n", str(ranks), str(root / "bin" / "IMB-MPI1")]
    argv += ["-msglog", f"{size.bit_length() - 1}:{size.bit_length() - 1}", "-npmin", str(ranks), "-iter", "20"]
    done = subprocess.run(
        [*argv, "-iter_policy", "off", "Allreduce"],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=RANK_TIMEOUT_S,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == [str(size)]]
    return float(rows[0][3]) / 1e3  # t_max, in microseconds


def _row(case: Case, ms: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.name, "bytes": case.size}
    row |= {f"{name}_ms": round(value, 4) for name, value in ms.items()}
    speedup = ms["gloo"] / ms["ccl"]
    row |= {"speedup": round(speedup, 2), "copies": round(ms["ccl"] / ms["copy"], 2)}
    target = _target(case)
    if target is not None:
        row |= {"target": target, "met": speedup >= target}
    if "imb" in ms:
        row |= {"imb_over_ccl": round(ms["imb"] / ms["ccl"], 2)}
    if "imb" in ms and case.size >= IMB_FROM:
        row |= {"imb_met": ms["imb"] >= ms["ccl"]}
    return row


def _target(case: Case) -> float | None:
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        return TARGETS.get(case.name)
    return BETWEEN_HOSTS.get(case.name, LEAST_BETWEEN_HOSTS)


def _line(row: dict[str, Any]) -> str:
    figures = (row["gloo_ms"], row["ccl_ms"], row["copy_ms"], row["speedup"], row["copies"])
    target = f"   target {row['target']}: {_met(row['met'])}" if "target" in row else ""
    compared = f"   Intel MPI {row['imb_ms']:.3f} ms, {row['imb_over_ccl']} times ccl" if "imb_ms" in row else ""
    judged = f", target 1.0: {_met(row['imb_met'])}" if "imb_met" in row else ""
    return f"{row['case']:<18}" + "".join(f"{figure:>10.3f}" for figure in figures) + target + compared + judged


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


if __name__ == "__main__":
    sys.exit(main())
