"""Cluster: the hosts of a run and what each of them is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.hostfile import HostEntry, Hostfile
from launcher.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFacts:
    """What a host told about itself."""

    topology: Topology
    python: str
    """Path of the interpreter its ranks run on."""
    versions: Mapping[str, str]
    """Installed distributions that matter to a run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One machine of the run."""

    host: str
    node_rank: int
    addr: str
    """Address the other nodes reach it at."""
    slots: int | None
    facts: HostFacts


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Nodes in node_rank order."""

    nodes: tuple[Node, ...]


def join(hostfile: Hostfile, facts: Sequence[HostFacts]) -> Cluster:
    """The cluster of these hosts; ``facts`` in the hostfile's order."""
    pairs = enumerate(zip(hostfile.entries, facts, strict=True))
    return Cluster(nodes=tuple(_node(rank, entry, known) for rank, (entry, known) in pairs))


def _node(node_rank: int, entry: HostEntry, facts: HostFacts) -> Node:
    addr = entry.addr or entry.host
    return Node(host=entry.host, node_rank=node_rank, addr=addr, slots=entry.slots, facts=facts)
