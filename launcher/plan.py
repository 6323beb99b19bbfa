"""LaunchPlan: all that will be started, in full, before anything is; JSON in and out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from falcon_dist import contract
from launcher import environment
from launcher.cluster import Cluster, Node
from launcher.config import LaunchConfig
from launcher.cpuset import CpuSet, union
from launcher.placement import Binding, PlacedRank, Placement
from launcher.redaction import redact

RANK_EVENT_FD: Final = 10
RANK_STORE_FD: Final = 11
"""Descriptors the agent keeps free for its ranks, so that a plan can name them beforehand."""

NOT_PROBED: Final = "<probed>"
"""Stands for what only a real start finds out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendezvous:
    """Where the ranks of an attempt meet."""

    addr: str
    port: int | None
    """None: not opened yet."""
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
        return f"{self.run_dir}/config.json"


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
    """A helper process of an agent: the node's preparation, or the rendezvous store."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    cpus: CpuSet
    task_dir: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NodePlan:
    """What one agent does."""

    host: str
    node_rank: int
    cwd: str
    prepare: TaskPlan | None
    """Run once, to its end, before any rank of any node starts."""
    store: TaskPlan | None
    """Keeps the rendezvous store on the socket the agent opened."""
    ranks: tuple[RankPlan, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; secrets included, since an agent needs them."""
        return _plain(dataclasses.asdict(self))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> NodePlan:
        """The inverse of to_json."""
        plain = {k: values[k] for k in ("host", "node_rank", "cwd")}
        return cls(
            **plain,
            prepare=_task(values["prepare"]),
            store=_task(values["store"]),
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


def build(
    config: LaunchConfig,
    cluster: Cluster,
    placement: Placement,
    site: Site,
    environ: Mapping[str, str],
    *,
    port: int | None,
) -> LaunchPlan:
    """The plan of one attempt; ``port``: where node 0's agent listens, None when nothing was opened.

    Raises:
        UserError: ``--env`` asks for what cannot be given.
    """
    served_by: Literal["rank", "agent"] = "rank" if config.program is None else "agent"
    rendezvous = Rendezvous(addr=cluster.nodes[0].addr, port=port, served_by=served_by)
    backend, _ = choose_backend(config, cluster)
    builder = _Builder(
        config=config,
        cluster=cluster,
        placement=placement,
        rendezvous=rendezvous,
        site=site,
        base=environment.base(environ, config.launch.env),
        backend=backend,
    )
    nodes = tuple(builder.node(node) for node in cluster.nodes)
    return LaunchPlan(site=site, rendezvous=rendezvous, backend=backend, nodes=nodes)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Builder:
    """What every part of a plan is made from."""

    config: LaunchConfig
    cluster: Cluster
    placement: Placement
    rendezvous: Rendezvous
    site: Site
    base: dict[str, str]
    backend: str

    def node(self, node: Node) -> NodePlan:
        seats = [p for p in self.placement.ranks if p.node_rank == node.node_rank]
        ours = self.config.program is None
        cpus = union(p.binding.cpus for p in seats)
        return NodePlan(
            host=node.host,
            node_rank=node.node_rank,
            cwd=self.site.cwd,
            prepare=self._prepare(node, cpus) if ours else None,
            store=self._store(node, cpus) if node.node_rank == 0 and not ours else None,
            ranks=tuple(self._rank(node, seat, len(seats)) for seat in seats),
        )

    def _rank(self, node: Node, seat: PlacedRank, local_world_size: int) -> RankPlan:
        rank_dir = f"{self.site.attempt_dir}/rank_{seat.rank:04d}"
        takes_store = seat.rank == 0 and self.rendezvous.served_by == "rank"
        return RankPlan(
            rank=seat.rank,
            local_rank=seat.local_rank,
            binding=seat.binding,
            argv=self._argv(node),
            env=self._env(seat, local_world_size, rank_dir, takes_store=takes_store),
            rank_dir=rank_dir,
            takes_store=takes_store,
        )

    def _argv(self, node: Node) -> tuple[str, ...]:
        program = self.config.program
        if program is not None:
            return (node.facts.python, *(("-m",) if program.module else ()), *program.argv)
        resume = ("--resume",) if self.config.resume_from else ()
        return (*_ours(node, "train"), "--config", self.site.config_file, *resume)

    def _env(self, seat: PlacedRank, local_world_size: int, rank_dir: str, *, takes_store: bool) -> dict[str, str]:
        place = environment.Seat(
            rank=seat.rank,
            local_rank=seat.local_rank,
            world_size=len(self.placement.ranks),
            local_world_size=local_world_size,
            node_rank=seat.node_rank,
            num_nodes=len(self.cluster.nodes),
        )
        meeting = environment.meeting_names(
            addr=self.rendezvous.addr,
            port=NOT_PROBED if self.rendezvous.port is None else str(self.rendezvous.port),
            run_id=self.site.run_id,
            attempt=self.site.attempt,
            served=self.rendezvous.served_by == "agent",
        )
        own = {contract.RANK_DIR: rank_dir, contract.EVENT_FD: str(RANK_EVENT_FD), contract.BACKEND: self.backend}
        store = {contract.STORE_FD: str(RANK_STORE_FD)} if takes_store else {}
        fixed = environment.seat_names(place) | meeting | environment.binding_names(seat.binding) | own | store
        return self._common(seat.binding) | fixed

    def _common(self, binding: Binding) -> dict[str, str]:
        iface = "lo" if len(self.cluster.nodes) == 1 else None
        return environment.defaults(binding, iface) | self.base

    def _prepare(self, node: Node, cpus: CpuSet) -> TaskPlan:
        whole = Binding(cpus=cpus, mem_nodes=CpuSet(), threads=len(cpus))
        return TaskPlan(
            argv=(*_ours(node, "prepare"), "--config", self.site.config_file),
            env=self._common(whole) | {contract.BACKEND: self.backend},
            cpus=cpus,
            task_dir=f"{self.site.attempt_dir}/prepare_{node.node_rank:04d}",
        )

    def _store(self, node: Node, cpus: CpuSet) -> TaskPlan:
        one = Binding(cpus=cpus, mem_nodes=CpuSet(), threads=1)
        size = str(len(self.placement.ranks))
        return TaskPlan(
            argv=(node.facts.python, "-P", "-m", "falcon_dist.store", str(RANK_STORE_FD), self.rendezvous.addr, size),
            env=self._common(one),
            cpus=cpus,
            task_dir=f"{self.site.attempt_dir}/store",
        )


def choose_backend(config: LaunchConfig, cluster: Cluster) -> tuple[str, str]:
    """The collective backend and, in a few words, why."""
    if config.program is not None:
        return "gloo", "the program chooses its own"
    if config.launch.backend != "auto":
        return config.launch.backend, "asked for"
    lacking = [n.host for n in cluster.nodes if "oneccl" not in n.facts.versions]
    if lacking:
        return "gloo", f"oneCCL is not installed on {lacking[0]}"
    return "ccl", "oneCCL is installed on every node"


def _ours(node: Node, verb: str) -> tuple[str, ...]:
    # -P: a folder called "datasets" where the user stands must not shadow a library.
    return (node.facts.python, "-P", "-m", "falcon_dist", verb)


def _redacted(node: NodePlan) -> NodePlan:
    def shown(task: TaskPlan | None) -> TaskPlan | None:
        return task and dataclasses.replace(task, env=redact(task.env))

    ranks = tuple(dataclasses.replace(r, env=redact(r.env)) for r in node.ranks)
    return dataclasses.replace(node, prepare=shown(node.prepare), store=shown(node.store), ranks=ranks)


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


def _task(values: Mapping[str, Any] | None) -> TaskPlan | None:
    if values is None:
        return None
    changed = {"argv": tuple(values["argv"]), "cpus": CpuSet.parse(values["cpus"])}
    return TaskPlan(**{**values, **changed})


def _rank(values: Mapping[str, Any]) -> RankPlan:
    b = values["binding"]
    sets = {k: CpuSet.parse(b[k]) for k in ("cpus", "comm_cpus", "mem_nodes")}
    changed = {"binding": Binding(**sets, threads=b["threads"]), "argv": tuple(values["argv"])}
    return RankPlan(**{**values, **changed})
