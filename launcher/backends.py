"""Which collective backend a run takes, and what oneCCL reads in each rank's environment. Pure."""

from __future__ import annotations

from typing import Final

from falcon_dist import ccl_environment, ccl_intel
from falcon_dist.ccl_environment import Provider
from launcher.binding import Binding
from launcher.cluster import Cluster, Node
from launcher.config import LaunchConfig
from launcher.environment import Seat
from launcher.errors import HostError

ONECCL: Final = "oneccl-cpu-devel"
"""Distribution whose headers and library the ccl backend is built against."""


def choose(config: LaunchConfig, cluster: Cluster) -> tuple[str, str]:
    """The collective backend and, in a few words, why.

    Raises:
        UserError: the one asked for cannot be used on a host.
    """
    if config.program is not None:
        return "gloo", "the program chooses its own"
    if config.launch.backend != "auto":
        _check(config.launch.backend, cluster)
        return config.launch.backend, "asked for"
    if unasked := [n.host for n in cluster.nodes if not n.facts.versions]:
        return "gloo", f"whether {unasked[0]} has oneCCL is not known: it was not asked"
    if lacking := _without_oneccl(cluster):
        return "gloo", f"oneCCL is not installed on {lacking[0]}"
    helpless = [n.host for n in cluster.nodes if not n.facts.compiler]
    if helpless:
        return "gloo", f"oneCCL is installed, but {helpless[0]} has no C++ compiler to build its backend"
    return "ccl", "oneCCL is installed on every node"


def names(seat: Seat, bindings: list[Binding], node: Node, fabric: Provider) -> dict[str, str]:
    """oneCCL's and libfabric's settings for a rank of this node; ``bindings``: of all ranks there.

    The folder of libfabric's providers is left to the rank, whose Python environment holds it.
    """
    comm = [sorted(b.comm_cpus) for b in bindings]
    memory = [node_id for b in bindings for node_id in sorted(b.mem_nodes)[:1]]
    return ccl_environment.environment(
        local_rank=seat.local_rank,
        local_size=seat.local_world_size,
        interface=node.ifname,
        comm_cpus=comm if any(comm) else (),
        comm_mem_nodes=memory if len(memory) == len(bindings) else (),
        provider=fabric,
    )


def fabric_of(cluster: Cluster) -> Provider:
    """libfabric's provider: what every node has hardware for, else tcp; shared memory inside a host either way."""
    found = {node.facts.fabric for node in cluster.nodes}
    return found.pop() if len(cluster.nodes) > 1 and len(found) == 1 else "tcp"


def _check(backend: str, cluster: Cluster) -> None:
    if backend == "ccl" and (lacking := _without_oneccl(cluster)):
        raise HostError(
            f'--backend: oneCCL is not installed on {", ".join(lacking)}: "ccl"; '
            "pip install 'falcon-dist[oneccl]' there, or take gloo",
            tuple(lacking),
        )
    if backend == "ccl-intel":
        faults = [(n.host, ccl_intel.fault(n.facts.versions)) for n in cluster.nodes if n.facts.versions]
        for host, fault in faults:
            if fault is not None:
                raise HostError(f"{fault} ({host})", (host,))


def _without_oneccl(cluster: Cluster) -> list[str]:
    """Hosts without it, of those that were asked for their versions."""
    return [n.host for n in cluster.nodes if n.facts.versions and ONECCL not in n.facts.versions]
