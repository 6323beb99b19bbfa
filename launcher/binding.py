"""Binding: what one rank is held to."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.cpuset import CpuSet


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """What a rank is held to before its program starts."""

    cpus: CpuSet
    """One cpu of each of its cores, or all of them where logical cpus are asked for."""
    comm_cpus: CpuSet = CpuSet()  # noqa: RUF009  # an immutable value
    """Cpus kept free for collective workers."""
    mem_nodes: CpuSet
    """NUMA nodes its memory comes from; empty: not bound."""
    threads: int
    """Compute threads: one a cpu."""
