"""Topology: what one machine is made of and how much of it a run may use, as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.cpuset import CpuSet, union
from launcher.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Core:
    """A physical core."""

    core: int
    """The kernel's core_id; unique within a socket only."""
    cpus: CpuSet
    """Its online cpus (one, or one per hyperthread)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NumaNode:
    """A memory domain and the cores next to it (those of one socket)."""

    numa_node: int
    cores: tuple[Core, ...]
    memory_bytes: int | None = None
    """None: the kernel does not tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Socket:
    """A processor package."""

    socket: int
    numa_nodes: tuple[NumaNode, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """One machine. A NUMA node that spans sockets (common in virtual machines) appears under each of them."""

    sockets: tuple[Socket, ...]
    memory_only: tuple[NumaNode, ...] = ()
    """NUMA nodes without cpus: HBM, CXL."""
    allowed: CpuSet
    """Cpus this process may run on: affinity mask and cpuset."""
    quota_cpus: float | None = None
    """CPU time the cgroup grants, in cpus; None: unlimited."""
    offline: CpuSet = CpuSet()  # noqa: RUF009  # an immutable value
    """Cpus that are there but switched off."""
    mems_allowed: CpuSet
    """NUMA nodes memory may come from; empty where the kernel has no NUMA."""

    @property
    def cpus(self) -> CpuSet:
        """All online cpus."""
        return union(c.cpus for s in self.sockets for n in s.numa_nodes for c in n.cores)

    def to_json(self) -> dict[str, Any]:
        """Nested lists; cpu sets as "0-3,8"."""
        return {
            "sockets": [
                {"socket": s.socket, "numa_nodes": [_node_json(n) for n in s.numa_nodes]} for s in self.sockets
            ],
            "memory_only": [_node_json(n) for n in self.memory_only],
            "allowed": str(self.allowed),
            "offline": str(self.offline),
            "quota_cpus": self.quota_cpus,
            "mems_allowed": str(self.mems_allowed),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str) -> Topology:
        """The inverse of to_json.

        Raises:
            UserError: the values are no topology; names ``source``.
        """
        try:
            quota = values.get("quota_cpus")
            return cls(
                sockets=tuple(_socket(s) for s in values["sockets"]),
                memory_only=tuple(_node(n) for n in values.get("memory_only", ())),
                allowed=CpuSet.parse(values["allowed"]),
                quota_cpus=None if quota is None else float(quota),
                offline=CpuSet.parse(values.get("offline", "")),
                mems_allowed=CpuSet.parse(values["mems_allowed"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as fault:
            raise UserError(f"{source}: no topology as `falcon topology` prints it: {fault!r}") from fault


def _node_json(node: NumaNode) -> dict[str, Any]:
    cores = [{"core": c.core, "cpus": str(c.cpus)} for c in node.cores]
    return {"numa_node": node.numa_node, "memory_bytes": node.memory_bytes, "cores": cores}


def _socket(values: Mapping[str, Any]) -> Socket:
    return Socket(socket=int(values["socket"]), numa_nodes=tuple(_node(n) for n in values["numa_nodes"]))


def _node(values: Mapping[str, Any]) -> NumaNode:
    memory = values.get("memory_bytes")
    return NumaNode(
        numa_node=int(values["numa_node"]),
        cores=tuple(Core(core=int(c["core"]), cpus=CpuSet.parse(c["cpus"])) for c in values["cores"]),
        memory_bytes=None if memory is None else int(memory),
    )
