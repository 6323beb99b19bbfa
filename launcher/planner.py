"""Makes the LaunchPlan: (LaunchConfig, Cluster, Placement) -> argv and environment of every process. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from falcon_dist import contract
from launcher import environment
from launcher.binding import Binding
from launcher.cluster import Cluster, Node
from launcher.config import LaunchConfig
from launcher.cpuset import CpuSet, union
from launcher.placement import PlacedRank, Placement
from launcher.plan import (
    NOT_PROBED,
    RANK_EVENT_FD,
    RANK_STORE_FD,
    LaunchPlan,
    NodePlan,
    RankPlan,
    Rendezvous,
    Site,
    TaskPlan,
)

ONECCL: Final = "oneccl-cpu-devel"
"""Distribution whose headers and library the ccl backend is built against."""


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
        return (*_ours(node, "train"), *self._config_words(), *resume)

    def _config_words(self) -> tuple[str, ...]:
        return ("--config", self.site.config_file, "--run-dir", self.site.run_dir)

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
            argv=(*_ours(node, "prepare"), *self._config_words()),
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
    lacking = [n.host for n in cluster.nodes if ONECCL not in n.facts.versions]
    if lacking:
        return "gloo", f"oneCCL is not installed on {lacking[0]}"
    return "ccl", "oneCCL is installed on every node"


def _ours(node: Node, verb: str) -> tuple[str, ...]:
    # -P: a folder called "datasets" where the user stands must not shadow a library.
    return (node.facts.python, "-P", "-m", "falcon_dist", verb)
