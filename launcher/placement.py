"""Placement: which physical cores each rank is held to. Pure: (Cluster, ranks per node) -> Bindings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

from launcher.binding import Binding
from launcher.cluster import Cluster, Node
from launcher.cpuset import CpuSet
from launcher.errors import UserError
from launcher.topology import Topology

T = TypeVar("T")


class UsableCore(NamedTuple):
    """A physical core a run may use, by the one cpu of it that a rank gets."""

    cpu: int
    """First thread that the affinity mask allows."""
    numa_node: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedRank:
    """One rank's seat."""

    rank: int
    node_rank: int
    local_rank: int
    binding: Binding


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """All seats in rank order: node by node."""

    ranks: tuple[PlacedRank, ...]


def place(cluster: Cluster, nproc_per_node: int | None) -> Placement:
    """Seats for every rank; None: one rank per NUMA node that has allowed cores, at least one.

    Raises:
        UserError: a node has fewer usable cores (or less CPU quota) than ranks.
    """
    placed: list[PlacedRank] = []
    for node in cluster.nodes:
        for local_rank, binding in enumerate(_bindings(node, nproc_per_node)):
            seat = PlacedRank(rank=len(placed), node_rank=node.node_rank, local_rank=local_rank, binding=binding)
            placed.append(seat)
    return Placement(ranks=tuple(placed))


def usable_cores(topology: Topology) -> list[list[UsableCore]]:
    """Allowed physical cores, grouped by NUMA node; the nodes of a socket stand together."""
    groups: dict[int, list[UsableCore]] = defaultdict(list)
    for socket in topology.sockets:
        for node in socket.numa_nodes:
            for core in node.cores:
                if allowed := core.cpus & topology.allowed:
                    groups[node.numa_node].append(UsableCore(min(allowed), node.numa_node))
    return [sorted(cores) for cores in groups.values()]


def _bindings(node: Node, wanted: int | None) -> list[Binding]:
    topology = node.facts.topology
    groups = usable_cores(topology)
    budget = _budget(topology, sum(map(len, groups)))
    count = wanted or min(len(groups), budget)
    if not groups or count > budget:
        raise UserError(_too_many(node, count, budget))
    return [_binding(cores, topology) for cores in _trim(_divide(groups, count), budget)]


def _budget(topology: Topology, num_cores: int) -> int:
    """How many threads may run at a time: a core each, and no more than the cgroup pays for."""
    quota = topology.quota_cpus
    return num_cores if quota is None else min(num_cores, max(1, math.floor(quota)))


def _too_many(node: Node, count: int, budget: int) -> str:
    topology = node.facts.topology
    quota = "" if topology.quota_cpus is None else f", CPU quota {topology.quota_cpus:g}"
    return (
        f"--nproc-per-node: {node.host} has {budget} usable physical cores "
        f'(allowed cpus {topology.allowed or "none"}{quota}), fewer than ranks: "{count}"; use {budget} or fewer'
    )


def _divide(groups: list[list[UsableCore]], count: int) -> list[list[UsableCore]]:
    """Disjoint cores for each of ``count`` ranks; no rank straddles NUMA nodes where that can be had."""
    if count >= len(groups):
        shares = _shares([len(g) for g in groups], count)
        return [part for g, n in zip(groups, shares, strict=True) if n for part in _chunks(g, n)]
    if len(groups) % count == 0:
        return [_interleave(part) for part in _chunks(groups, count)]
    return _chunks([core for group in groups for core in group], count)


def _shares(sizes: list[int], count: int) -> list[int]:
    """Ranks per NUMA node: equal where every node has the cores for it, else where most cores are left a rank."""
    equal, rest = divmod(count, len(sizes))
    if rest == 0 and min(sizes) >= equal:
        return [equal] * len(sizes)
    shares = [0] * len(sizes)
    for _ in range(count):
        roomiest = max(range(len(sizes)), key=lambda i: sizes[i] / (shares[i] + 1))
        shares[roomiest] += 1
    return shares


def _chunks(items: Sequence[T], count: int) -> list[list[T]]:
    """``count`` neighbouring pieces whose lengths differ by at most one."""
    size, longer = divmod(len(items), count)
    ends = [size * i + min(i, longer) for i in range(count + 1)]
    return [list(items[a:b]) for a, b in pairwise(ends)]


def _interleave(groups: list[list[UsableCore]]) -> list[UsableCore]:
    """The cores of several NUMA nodes in turns, so that a cut falls on all of them alike."""
    return [core for _, _, core in sorted((i, n, c) for n, g in enumerate(groups) for i, c in enumerate(g))]


def _trim(parts: list[list[UsableCore]], budget: int) -> list[list[UsableCore]]:
    """Equal ranks: a step lasts as long as its slowest rank, so more than one core above the least is idle."""
    share, longer = divmod(budget, len(parts))
    caps = [share + (i < longer) for i in range(len(parts))]
    least = min(min(len(p), cap) for p, cap in zip(parts, caps, strict=True))
    return [p[: min(cap, least + 1)] for p, cap in zip(parts, caps, strict=True)]


def _binding(cores: list[UsableCore], topology: Topology) -> Binding:
    near = CpuSet.of(core.numa_node for core in cores)
    return Binding(
        cpus=CpuSet.of(core.cpu for core in cores),
        mem_nodes=near & topology.mems_allowed,
        threads=len(cores),
    )
