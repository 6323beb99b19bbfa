"""What this rank really runs on, against what the launcher planned. Linux only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from falcon_dist import contract


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """The binding as the kernel and torch see it."""

    cpus: str
    """Affinity mask, as "0-3,8"."""
    threads: int
    """torch's intra-op threads."""


def take_threads(env: Mapping[str, str]) -> None:
    """Gives torch as many threads as the binding has cores, where one was planned."""
    planned = env.get(contract.PLANNED_THREADS)
    if planned is not None:
        torch.set_num_threads(int(planned))


def observe() -> Observed:
    """This process's binding now."""
    return Observed(cpus=fold(os.sched_getaffinity(0)), threads=torch.get_num_threads())


def mismatch(observed: Observed, env: Mapping[str, str]) -> str | None:
    """What differs from the plan in one line, or None. Importing torch can narrow the mask (KMP_AFFINITY)."""
    planned = env.get(contract.PLANNED_CPUS, observed.cpus)
    if planned != observed.cpus:
        return f'this rank was bound to cpus "{planned}" but runs on "{observed.cpus}"'
    threads = env.get(contract.PLANNED_THREADS, str(observed.threads))
    if threads != str(observed.threads):
        return f"this rank was given {threads} threads but torch uses {observed.threads}"
    return None


def fold(cpus: Iterable[int]) -> str:
    """{0, 1, 2, 8} -> "0-2,8"."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def unfold(text: str) -> set[int]:
    """ "0-2,8" -> {0, 1, 2, 8}; empty where the text is no such list."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            return set()
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def peak_rss_bytes() -> int:
    """VmHWM: the most resident memory this process ever had, in bytes (proc(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
