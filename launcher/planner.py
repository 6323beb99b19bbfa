"""Makes the LaunchPlan: (LaunchConfig, Cluster, Placement) -> argv and environment of every process. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from falcon_dist import contract
from launcher import backends, engines, environment
from launcher.binding import Binding
from launcher.cluster import Cluster, Node
from launcher.config import LaunchConfig
from launcher.cpuset import CpuSet, union
from launcher.errors import HostError
from launcher.network import NOT_PROBED
from launcher.placement import PlacedRank, Placement
from launcher.plan import (
    RANK_EVENT_FD,
    RANK_STORE_FD,
    LaunchPlan,
    NodePlan,
    RankPlan,
    Rendezvous,
    Site,
    TaskPlan,
)

COURIER_TOKEN: Final = "FALCON_COURIER_TOKEN"  # noqa: S105  # the variable's name


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """What node 0 has opened for the others; nothing in a dry run."""

    port: int | None = None
    courier_port: int | None = None
    courier_token: str = NOT_PROBED


def build(
    config: LaunchConfig,
    cluster: Cluster,
    placement: Placement,
    site: Site,
    environ: Mapping[str, str],
    *,
    opened: Opened,
    config_text: str = "",
) -> LaunchPlan:
    """The plan of one attempt; ``config_text``: what ``config.json`` holds.

    Raises:
        UserError: ``--engine``, ``--env`` or ``--memory-allocator`` ask for what cannot be given.
    """
    served_by: Literal["rank", "agent"] = "rank" if config.program is None else "agent"
    rendezvous = Rendezvous(addr=cluster.addr, port=opened.port, courier_port=opened.courier_port, served_by=served_by)
    engines.check(config, cluster)
    backend, _ = backends.choose(config, cluster)
    builder = _Builder(
        config=config,
        cluster=cluster,
        placement=placement,
        rendezvous=rendezvous,
        site=site,
        environ=environ,
        backend=backend,
        courier_token=opened.courier_token,
        config_text=config_text,
    )
    nodes = tuple(builder.node(node) for node in cluster.nodes)
    return LaunchPlan(site=site, rendezvous=rendezvous, backend=backend, nodes=nodes)


def needs_courier(config: LaunchConfig, num_nodes: int) -> bool:
    """Whether node 0 prepares for others too."""
    return config.program is None and num_nodes > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class _Builder:
    """What every part of a plan is made from."""

    config: LaunchConfig
    cluster: Cluster
    placement: Placement
    rendezvous: Rendezvous
    site: Site
    environ: Mapping[str, str]
    backend: str
    courier_token: str
    config_text: str

    def node(self, node: Node) -> NodePlan:
        seats = [p for p in self.placement.ranks if p.node_rank == node.node_rank]
        ours = self.config.program is None
        cpus = union(p.binding.cpus for p in seats)
        return NodePlan(
            host=node.host,
            node_rank=node.node_rank,
            # Our own program needs nothing of where the user stands, but on node 0, where data and model may be.
            cwd=self.site.cwd if node.node_rank == 0 or not ours else self.site.attempt_dir,
            roster=f"{self.site.attempt_dir}/agent_{node.node_rank:04d}.json",
            files={self.site.config_file: self.config_text},
            prepare=self._prepare(node, cpus) if ours else (),
            store=self._store(node, cpus) if node.node_rank == 0 and not ours else None,
            ranks=tuple(self._rank(node, seat, seats) for seat in seats),
        )

    def _rank(self, node: Node, seat: PlacedRank, seats: list[PlacedRank]) -> RankPlan:
        rank_dir = f"{self.site.attempt_dir}/rank_{seat.rank:04d}"
        takes_store = seat.rank == 0 and self.rendezvous.served_by == "rank"
        return RankPlan(
            rank=seat.rank,
            local_rank=seat.local_rank,
            binding=seat.binding,
            argv=self._argv(node),
            env=self._env(node, seat, seats, rank_dir, takes_store=takes_store),
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

    def _env(
        self, node: Node, seat: PlacedRank, seats: list[PlacedRank], rank_dir: str, *, takes_store: bool
    ) -> dict[str, str]:
        place = environment.Seat(
            rank=seat.rank,
            local_rank=seat.local_rank,
            world_size=len(self.placement.ranks),
            local_world_size=len(seats),
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
        comm = backends.names(place, [s.binding for s in seats], node, backends.fabric_of(self.cluster))
        common = comm | dict(self._allocator(node)) | self._common(node, seat.binding)
        fixed = environment.seat_names(place) | meeting | environment.binding_names(seat.binding) | own | store
        return common | fixed | self._received(node)

    def _common(self, node: Node, binding: Binding) -> dict[str, str]:
        base = environment.base(self.environ, node.facts.identity, self.config.launch.env)
        return environment.defaults(binding, node.ifname) | base

    def _allocator(self, node: Node) -> Mapping[str, str]:
        name = self.config.launch.memory_allocator
        if name == "default":
            spares = self.config.program is None and self.config.train.strategy == "full-lowmem"
            return environment.GLIBC_SPARING if spares else environment.GLIBC_TUNED
        if name not in node.facts.allocators:
            raise HostError(
                f'--memory-allocator: {node.host} has no library of it: "{name}"; install it (Debian: '
                "libtcmalloc-minimal4, libjemalloc2), or leave the flag out",
                (node.host,),
            )
        return {"LD_PRELOAD": node.facts.allocators[name]}

    def _received(self, node: Node) -> dict[str, str]:
        """Where a node that does not prepare by itself finds what it has got."""
        if node.node_rank == 0 or self.config.program is not None:
            return {}
        return {contract.PREPARED: f"{self._task_dir(node)}/prepared.json"}

    def _task_dir(self, node: Node) -> str:
        return f"{self.site.attempt_dir}/prepare_{node.node_rank:04d}"

    def _prepare(self, node: Node, cpus: CpuSet) -> tuple[TaskPlan, ...]:
        """Node 0 makes what is needed and hands it out; the others take it, and build what they run."""
        own = self._task(node, cpus, (*_ours(node, "prepare"), *self._config_words()))
        others = len(self.cluster.nodes) - 1
        if node.node_rank == 0:
            resumed = (f"{self.site.run_dir}/checkpoints",) if self.config.resume_from else ()
            offer = ("offer", str(RANK_STORE_FD), f"{self.site.run_dir}/prepared.json", str(others), *resumed)
            return (own, self._courier(node, cpus, offer, listens="courier")) if others else (own,)
        port = NOT_PROBED if self.rendezvous.courier_port is None else str(self.rendezvous.courier_port)
        receive = ("receive", self.rendezvous.addr, port, self._received(node)[contract.PREPARED])
        built = (own,) if self.backend == "ccl" else ()
        return (self._courier(node, cpus, receive), *built)

    def _courier(
        self, node: Node, cpus: CpuSet, words: tuple[str, ...], listens: Literal["courier"] | None = None
    ) -> TaskPlan:
        argv = (node.facts.python, "-P", "-m", "launcher.courier", *words)
        return self._task(node, cpus, argv, {COURIER_TOKEN: self.courier_token}, listens)

    def _task(
        self,
        node: Node,
        cpus: CpuSet,
        argv: tuple[str, ...],
        more: Mapping[str, str] | None = None,
        listens: Literal["courier"] | None = None,
    ) -> TaskPlan:
        whole = Binding(cpus=cpus, mem_nodes=CpuSet(), threads=len(cpus))
        env = self._common(node, whole) | {contract.BACKEND: self.backend} | self._received(node) | dict(more or {})
        return TaskPlan(argv=argv, env=env, cpus=cpus, task_dir=self._task_dir(node), listens=listens)

    def _store(self, node: Node, cpus: CpuSet) -> TaskPlan:
        one = Binding(cpus=cpus, mem_nodes=CpuSet(), threads=1)
        size = str(len(self.placement.ranks))
        return TaskPlan(
            argv=(node.facts.python, "-P", "-m", "falcon_dist.store", str(RANK_STORE_FD), self.rendezvous.addr, size),
            env=self._common(node, one),
            cpus=cpus,
            task_dir=f"{self.site.attempt_dir}/store",
            listens="store",
        )


def _ours(node: Node, verb: str) -> tuple[str, ...]:
    # -P: a folder called "datasets" where the user stands must not shadow a library.
    return (node.facts.python, "-P", "-m", "falcon_dist", verb)
