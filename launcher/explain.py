"""Why cpus of a host are not given to ranks, in the order in which they were left out. Pure."""

from __future__ import annotations

from launcher.cluster import Cluster, Node
from launcher.cpuset import CpuSet, union
from launcher.placement import Policy, bindings, budget_of, roomy, usable_cores

Row = tuple[str, str, str]


def unused(cluster: Cluster, policy: Policy) -> list[Row]:
    """Host, cpus and reason."""
    return [(node.host, str(cpus), why) for node in cluster.nodes for cpus, why in _of_node(node, policy) if cpus]


def _of_node(node: Node, policy: Policy) -> list[tuple[CpuSet, str]]:
    topology = node.facts.topology
    groups = usable_cores(node, policy)
    cores = [core for group in groups for core in group]
    usable = CpuSet.of(cpu for core in cores for cpu in core.cpus)
    first = CpuSet.of(core.cpu for core in cores)
    given = bindings(node, policy)
    comm = union(b.comm_cpus for b in given)
    compute = union(b.cpus for b in given)
    small = first - CpuSet.of(core.cpu for group in roomy(node, policy, groups) for core in group)
    idle = first - compute - comm - small
    if policy.use_logical_cores:  # what becomes of a core becomes of all its threads
        comm, small, idle = (
            CpuSet.of(cpu for core in cores if core.cpu in part for cpu in core.cpus) for part in (comm, small, idle)
        )
    seconds = usable - first - compute - comm - small - idle
    return [
        (topology.offline, "offline"),
        (topology.cpus - topology.allowed, "outside this process's affinity mask or cpuset"),
        (topology.allowed - usable, _chosen_by(policy, node)),
        (seconds, "another thread of a core that is used; --use-logical-cores takes it"),
        (comm, "kept free for collective workers (--ccl-worker-count)"),
        (small, "far fewer than another NUMA node has; --nproc-per-node numa gives each a rank"),
        (idle, _idle_because(node, policy, len(cores), budget_of(topology, groups, policy))),
    ]


def _chosen_by(policy: Policy, node: Node) -> str:
    flags = {
        "--sockets": policy.sockets,
        "--numa-nodes": policy.numa_nodes,
        "--cores-list": policy.cores_list,
        f"cores= ({node.place})": node.entry.cores,
    }
    return "left out by " + ", ".join(name for name, value in flags.items() if value is not None)


def _idle_because(node: Node, policy: Policy, num_cores: int, budget: int) -> str:
    if budget < num_cores:
        return f"the cgroup pays for {node.facts.topology.quota_cpus:g} cpus"
    if policy.ncores_per_rank is not None:
        return f"--ncores-per-rank {policy.ncores_per_rank}"
    if node.entry.seats is not None:
        return "slots that --include or --exclude left out"
    return "ranks are kept equal: a step lasts as long as its slowest rank"
