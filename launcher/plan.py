"""LaunchPlan: all that will be started, in full, before anything is; JSON in and out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from launcher.binding import Binding
from launcher.cpuset import CpuSet
from launcher.redaction import redact

RANK_EVENT_FD: Final = 10
RANK_STORE_FD: Final = 11
"""Descriptors the agent keeps free for its ranks, so that a plan can name them beforehand."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Where the ranks of an attempt meet."""

    addr: str
    port: int | None
    """None: not opened yet."""
    courier_port: int | None = None
    """Where node 0 hands out what it has prepared; None: not opened, or nobody needs it."""
    served_by: Literal["rank", "agent"]
    """Who keeps the store: rank 0 of our own program, or a process of node 0's agent for any other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """What an attempt is called and where it lives; paths are absolute."""

    run_id: str
    attempt: int
    run_dir: str
    cwd: str

    @property
    def attempt_dir(self) -> str:
        """Folder of this attempt."""
        return f"{self.run_dir}/attempt_{self.attempt}"

    @property
    def config_file(self) -> str:
        """The configuration every rank reads."""
        return f"{self.attempt_dir}/config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """One rank."""

    rank: int
    local_rank: int
    binding: Binding
    argv: tuple[str, ...]
    env: Mapping[str, str]
    rank_dir: str
    takes_store: bool = False
    """It is handed the listening rendezvous socket."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskPlan:
    """A helper process of an agent: a step of the node's preparation, or the rendezvous store."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cpus: CpuSet
    task_dir: str
    listens: Literal["store", "courier"] | None = None
    """It is handed this listening socket of the agent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePlan:
    """What one agent does."""

    host: str
    node_rank: int
    cwd: str
    roster: str
    """File in which the agent says who it is."""
    files: Mapping[str, str]
    """Text files the node needs, by path; in a shared run folder they are there already."""
    prepare: tuple[TaskPlan, ...]
    """Run one after the other, each to its end, before any rank of any node starts."""
    store: TaskPlan | None
    """Keeps the rendezvous store on the socket the agent opened."""
    ranks: tuple[RankPlan, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; secrets included, since an agent needs them."""
        return _plain(dataclasses.asdict(self))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> NodePlan:
        """The inverse of to_json."""
        plain = {k: values[k] for k in ("host", "node_rank", "cwd", "roster", "files")}
        return cls(
            **plain,
            prepare=tuple(_task(t) for t in values["prepare"]),
            store=_task(values["store"]) if values["store"] else None,
            ranks=tuple(_rank(r) for r in values["ranks"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """One attempt of a run."""

    site: Site
    rendezvous: Rendezvous
    backend: str
    nodes: tuple[NodePlan, ...]

    @property
    def ranks(self) -> tuple[RankPlan, ...]:
        """All ranks in rank order."""
        return tuple(rank for node in self.nodes for rank in node.ranks)

    def to_json(self) -> dict[str, Any]:
        """Plain values; secrets included."""
        nodes = [n.to_json() for n in self.nodes]
        head = {"site": dataclasses.asdict(self.site), "rendezvous": dataclasses.asdict(self.rendezvous)}
        return head | {"backend": self.backend, "nodes": nodes}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LaunchPlan:
        """The inverse of to_json."""
        return cls(
            site=Site(**values["site"]),
            rendezvous=Rendezvous(**values["rendezvous"]),
            backend=values["backend"],
            nodes=tuple(NodePlan.from_json(n) for n in values["nodes"]),
        )

    def redacted(self) -> LaunchPlan:
        """The plan as it may be kept and shown."""
        return dataclasses.replace(self, nodes=tuple(_redacted(n) for n in self.nodes))


def _redacted(node: NodePlan) -> NodePlan:
    def shown(task: TaskPlan) -> TaskPlan:
        return dataclasses.replace(task, env=redact(task.env))

    ranks = tuple(dataclasses.replace(r, env=redact(r.env)) for r in node.ranks)
    prepare = tuple(map(shown, node.prepare))
    return dataclasses.replace(node, prepare=prepare, store=node.store and shown(node.store), ranks=ranks)


def _plain(value: Any) -> Any:
    match value:
        case CpuSet():
            return str(value)
        case dict():
            # asdict() has turned a CpuSet inside a dataclass into {"ids": ...}
            return str(CpuSet.of(value["ids"])) if set(value) == {"ids"} else {k: _plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_plain(v) for v in value]
        case _:
            return value


def _task(values: Mapping[str, Any]) -> TaskPlan:
    changed = {"argv": tuple(values["argv"]), "cpus": CpuSet.parse(values["cpus"])}
    return TaskPlan(**{**values, **changed})


def _rank(values: Mapping[str, Any]) -> RankPlan:
    b = values["binding"]
    sets = {k: CpuSet.parse(b[k]) for k in ("cpus", "comm_cpus", "mem_nodes")}
    changed = {"binding": Binding(**sets, threads=b["threads"]), "argv": tuple(values["argv"])}
    return RankPlan(**{**values, **changed})
