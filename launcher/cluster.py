"""Cluster: the hosts of a run, what each of them is made of, and how they meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from falcon_dist.ccl_environment import Provider
from launcher.hostfile import HostEntry, Hostfile
from launcher.network import Meeting
from launcher.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class HostFacts:
    """What a host told about itself."""

    topology: Topology
    python: str
    """Path of the interpreter its ranks run on."""
    versions: Mapping[str, str]
    """Installed distributions that matter to a run."""
    python_version: str = ""
    machine: str = ""
    """Stands for the machine and its boot; empty: not asked."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """HOME and other variables that are the host's own business."""
    allocators: Mapping[str, str] = field(default_factory=dict)
    """Path of each memory allocator that was found."""
    fabric: Provider = "tcp"
    """libfabric's provider for the fastest network hardware it has."""
    compiler: str = "g++"
    """Path of the C++ compiler; empty: none. Taken to be there where a host was not asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One machine of the run."""

    entry: HostEntry
    place: str
    """Where the user named it, for errors."""
    node_rank: int
    ifname: str
    """Network interface it reaches the others by."""
    facts: HostFacts

    @property
    def host(self) -> str:
        """Its name as the user gave it."""
        return self.entry.host


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Nodes in node_rank order."""

    nodes: tuple[Node, ...]
    addr: str
    """Address of node 0 at which all of them meet."""


def join(hostfile: Hostfile, facts: Sequence[HostFacts], meeting: Meeting) -> Cluster:
    """The cluster of these hosts; ``facts`` in the hostfile's order."""
    together = zip(hostfile.entries, facts, meeting.ifnames, strict=True)
    nodes = tuple(
        Node(entry=entry, place=hostfile.place_of(entry), node_rank=rank, ifname=ifname, facts=known)
        for rank, (entry, known, ifname) in enumerate(together)
    )
    return Cluster(nodes=nodes, addr=meeting.addr)
