"""Placement: which physical cores each rank is held to. Pure: (Cluster, Policy) -> Bindings."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, NamedTuple, TypeVar

from launcher.binding import Binding
from launcher.cluster import Cluster, Node
from launcher.cpuset import CpuSet, union
from launcher.errors import HostError, UserError
from launcher.topology import Topology

T = TypeVar("T")
Per = Literal["numa_node", "socket"]
SMALLEST: Final = 2
"""A NUMA node with less than this part (a half) of the largest one's cores gets a rank only where that is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How many ranks, and of what."""

    nproc_per_node: int | None = None
    """None: the host's slots, else one rank for each ``per``."""
    by_slots: bool = True
    """False: one for each ``per`` whatever the slots, which only say how many a host takes at most."""
    per: Per = "numa_node"
    sockets: CpuSet | None = None
    """Use these sockets only."""
    numa_nodes: CpuSet | None = None
    """Use these NUMA nodes only."""
    cores_list: CpuSet | None = None
    """Use these cpus only."""
    ncores_per_rank: int | None = None
    """Compute cores of each rank; None: as many as there are."""
    use_logical_cores: bool = False
    """A rank gets all threads of its cores."""
    comm_cores: int = 0
    """Cores of each rank kept free for collective workers."""


class UsableCore(NamedTuple):
    """A physical core a run may use."""

    cpu: int
    """First thread that the affinity mask allows."""
    numa_node: int
    socket: int
    cpus: tuple[int, ...]
    """All threads that it allows."""


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


def place(cluster: Cluster, policy: Policy) -> Placement:
    """Seats for every rank.

    Raises:
        UserError: a node has fewer usable cores (or less CPU quota, or fewer slots) than ranks.
    """
    placed: list[PlacedRank] = []
    for node in cluster.nodes:
        for local_rank, binding in enumerate(bindings(node, policy)):
            seat = PlacedRank(rank=len(placed), node_rank=node.node_rank, local_rank=local_rank, binding=binding)
            placed.append(seat)
    return Placement(ranks=tuple(placed))


def usable_cores(node: Node, policy: Policy) -> list[list[UsableCore]]:
    """Allowed physical cores, grouped by NUMA node; the nodes of a socket stand together.

    For ranks of sockets by socket too: a NUMA node, or a machine that tells of none, can span several.
    """
    topology, cpus = node.facts.topology, _chosen_cpus(node, policy)
    groups: dict[tuple[int, int], list[UsableCore]] = defaultdict(list)
    for socket in topology.sockets:
        for numa in socket.numa_nodes:
            for core in numa.cores:
                if allowed := core.cpus & cpus:
                    threads = tuple(allowed)
                    group = numa.numa_node, socket.socket if policy.per == "socket" else 0
                    groups[group].append(UsableCore(threads[0], numa.numa_node, socket.socket, threads))
    return [sorted(cores) for cores in groups.values()]


def bindings(node: Node, policy: Policy) -> list[Binding]:
    """The bindings of one node's ranks.

    Raises:
        UserError: as for ``place``.
    """
    groups = roomy(node, policy, usable_cores(node, policy))
    budget = budget_of(node.facts.topology, groups, policy)
    count, seats = _count(node, policy, groups, budget)
    # A worker without a core of its own, or a rank without one to compute on, is no placement.
    if not groups or count * (1 + policy.comm_cores) > budget:
        raise HostError(_too_many(node, policy, count, budget), (node.host,))
    least = 1 + policy.comm_cores if policy.by_slots else 1  # one for each of them is no other number of ranks
    parts = _trim(_divide(groups, count, policy.per, least), budget, _most_cores(policy))
    return [_binding(node, policy, parts[seat]) for seat in seats]


def roomy(node: Node, policy: Policy, groups: list[list[UsableCore]]) -> list[list[UsableCore]]:
    """Groups that ranks are given where nobody said how many: one that is far smaller would hold back all the others.

    Ranks are equal, so each of two on 1 and 7 cores would get hardly more than one.
    """
    if not groups or policy.nproc_per_node is not None or not policy.by_slots or node.entry.slots is not None:
        return groups
    units = [group[0].socket if policy.per == "socket" else number for number, group in enumerate(groups)]
    sizes = Counter(unit for unit, group in zip(units, groups, strict=True) for _ in group)
    least = max(1 + policy.comm_cores, math.ceil(max(sizes.values()) / SMALLEST))
    kept = [group for unit, group in zip(units, groups, strict=True) if sizes[unit] >= least]
    return kept if 2 * sum(map(len, kept)) >= sizes.total() else groups  # many small ones are no exception


def budget_of(topology: Topology, groups: Sequence[Sequence[UsableCore]], policy: Policy) -> int:
    """How many cores may work at a time: no more than the cgroup pays for."""
    cores = [core for group in groups for core in group]
    if topology.quota_cpus is None or not cores:
        return len(cores)
    threads = max(len(c.cpus) for c in cores) if policy.use_logical_cores else 1
    return min(len(cores), max(1, math.floor(topology.quota_cpus / threads)))


def _chosen_cpus(node: Node, policy: Policy) -> CpuSet:
    """Allowed cpus that the flags and the hostfile leave.

    Raises:
        UserError: they name what this machine has not.
    """
    topology = node.facts.topology
    numa = [n for s in topology.sockets for n in s.numa_nodes]
    cpus = topology.allowed
    if policy.sockets is not None:
        known = {s.socket: union(c.cpus for n in s.numa_nodes for c in n.cores) for s in topology.sockets}
        cpus &= _picked("--sockets", "socket", node, policy.sockets, known)
    if policy.numa_nodes is not None:
        known = {n.numa_node: CpuSet() for n in numa}
        for n in numa:
            known[n.numa_node] |= union(c.cpus for c in n.cores)
        cpus &= _picked("--numa-nodes", "NUMA node", node, policy.numa_nodes, known)
    for place, wanted in (("--cores-list", policy.cores_list), (node.place, node.entry.cores)):
        if wanted is not None:
            cpus &= _picked(place, "allowed cpu", node, wanted, {c: CpuSet.of([c]) for c in topology.allowed})
    return cpus


def _picked(place: str, what: str, node: Node, wanted: CpuSet, known: dict[int, CpuSet]) -> CpuSet:
    if missing := wanted - CpuSet.of(known):
        has = CpuSet.of(known)
        raise HostError(f'{place}: {node.host} has no such {what}: "{missing}"; it has "{has}"', (node.host,))
    return union(known[number] for number in wanted)


def _count(
    node: Node, policy: Policy, groups: Sequence[Sequence[UsableCore]], budget: int
) -> tuple[int, tuple[int, ...]]:
    """Into how many parts the node is cut, and which of them become ranks."""
    units = len({g[0].socket for g in groups}) if policy.per == "socket" else len(groups)
    units = max(1, min(units, budget // (1 + policy.comm_cores)))
    wanted, entry = policy.nproc_per_node or (None if policy.by_slots else units), node.entry
    if entry.seats is not None and entry.slots is not None:
        if wanted is not None and wanted > len(entry.seats):
            raise UserError(_over_slots(node, wanted, len(entry.seats)))
        return entry.slots, entry.seats[: wanted or len(entry.seats)]
    most = entry.max_slots or entry.slots
    if wanted is not None and most is not None and wanted > most:
        raise UserError(_over_slots(node, wanted, most))
    count = wanted or entry.slots or units
    return count, tuple(range(count))


def _over_slots(node: Node, wanted: int, most: int) -> str:
    return f'{node.place}: {node.host} takes {most} ranks, fewer than --nproc-per-node: "{wanted}"; raise slots='


def _too_many(node: Node, policy: Policy, count: int, budget: int) -> str:
    topology = node.facts.topology
    quota = "" if topology.quota_cpus is None else f", CPU quota {topology.quota_cpus:g}"
    from_slots = policy.nproc_per_node is None and policy.by_slots and node.entry.slots is not None
    place = node.place if from_slots else "--nproc-per-node"
    comm = f" that keep {policy.comm_cores} cores each for communication" if policy.comm_cores else ""
    most = budget // (1 + policy.comm_cores)
    return (
        f"{place}: {node.host} has {budget} usable physical cores (allowed cpus {topology.allowed or 'none'}{quota}), "
        f'fewer than ranks{comm}: "{count}"; use {most} or fewer'
    )


def _divide(groups: list[list[UsableCore]], count: int, per: Per, least: int) -> list[list[UsableCore]]:
    """Disjoint cores for each rank, ``least`` or more; no rank straddles NUMA nodes where that can be had."""
    ways = list(_ways(groups, count, per, least))
    return next((parts for parts in ways if min(map(len, parts)) >= least), ways[-1])


def _ways(groups: list[list[UsableCore]], count: int, per: Per, least: int) -> Iterator[list[list[UsableCore]]]:
    """What can be cut into ``count`` parts, the best first."""
    if count >= len(groups):
        shares = _shares([len(g) for g in groups], count, least)
        yield [part for g, n in zip(groups, shares, strict=True) if n for part in _chunks(g, n)]
    elif per == "socket" and count == len(sockets := _by_socket(groups)):
        yield [_interleave(part) for part in sockets]
    elif len(groups) % count == 0:
        yield [_interleave(part) for part in _chunks(groups, count)]
    yield _chunks([core for group in groups for core in group], count)


def _by_socket(groups: list[list[UsableCore]]) -> list[list[list[UsableCore]]]:
    found: dict[int, list[list[UsableCore]]] = defaultdict(list)
    for group in groups:
        found[group[0].socket].append(group)
    return list(found.values())


def _shares(sizes: list[int], count: int, least: int) -> list[int]:
    """Ranks per NUMA node: equal where every node has the cores for it, else where most cores are left a rank."""
    equal, rest = divmod(count, len(sizes))
    if rest == 0 and min(sizes) >= equal * least:
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


def _most_cores(policy: Policy) -> int | None:
    return None if policy.ncores_per_rank is None else policy.ncores_per_rank + policy.comm_cores


def _trim(parts: list[list[UsableCore]], budget: int, most: int | None) -> list[list[UsableCore]]:
    """Equal ranks: a step lasts as long as its slowest rank, so more than one core above the least is idle."""
    share, longer = divmod(budget, len(parts))
    caps = [share + (i < longer) for i in range(len(parts))]
    caps = [cap if most is None else min(cap, most) for cap in caps]
    least = min(min(len(p), cap) for p, cap in zip(parts, caps, strict=True))
    return [p[: min(cap, least + 1)] for p, cap in zip(parts, caps, strict=True)]


def _binding(node: Node, policy: Policy, cores: list[UsableCore]) -> Binding:
    """A rank's cores; the last ones are kept for communication, so that they are its NUMA node's own."""
    at = len(cores) - policy.comm_cores
    wanted = policy.ncores_per_rank
    if at < 1 or (wanted is not None and at < wanted):
        flag, asked = ("--ccl-worker-count", policy.comm_cores) if wanted is None else ("--ncores-per-rank", wanted)
        raise HostError(
            f"{flag}: {node.host} has {max(at, 0)} cores for a rank's computing"
            f'{" beside its communication" if policy.comm_cores else ""}: "{asked}"; use fewer ranks or cores',
            (node.host,),
        )
    cpus = CpuSet.of(cpu for c in cores[:at] for cpu in (c.cpus if policy.use_logical_cores else (c.cpu,)))
    near = CpuSet.of(core.numa_node for core in cores)
    return Binding(
        cpus=cpus,
        comm_cpus=CpuSet.of(core.cpu for core in cores[at:]),
        mem_nodes=near & node.facts.topology.mems_allowed,
        threads=len(cpus),
    )
