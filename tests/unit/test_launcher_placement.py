from hypothesis import given
from hypothesis import strategies as st

from launcher import placement
from launcher.cluster import HostFacts, join
from launcher.cpuset import CpuSet
from launcher.hostfile import HostEntry, Hostfile
from launcher.network import alone
from launcher.placement import Policy, usable_cores
from launcher.topology import Core, NumaNode, Socket, Topology


@st.composite
def machines(draw):
    """Any sockets x NUMA nodes x cores x threads, part of it allowed, perhaps with a quota."""
    num_sockets, per_socket = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    smt = draw(st.integers(1, 2))
    cpu, sockets = 0, []
    for s in range(num_sockets):
        nodes = []
        for n in range(per_socket):
            cores = []
            for c in range(draw(st.integers(1, 6))):
                cores.append(Core(core=c, cpus=CpuSet.of(range(cpu, cpu + smt))))
                cpu += smt
            nodes.append(NumaNode(numa_node=s * per_socket + n, cores=tuple(cores)))
        sockets.append(Socket(socket=s, numa_nodes=tuple(nodes)))
    allowed = draw(st.frozensets(st.integers(0, cpu - 1), min_size=1))
    quota = draw(st.none() | st.floats(0.5, cpu))
    mems = CpuSet.of(range(num_sockets * per_socket))
    return Topology(sockets=tuple(sockets), allowed=CpuSet(allowed), quota_cpus=quota, mems_allowed=mems)


def only_node(topology, **entry):
    facts = HostFacts(topology=topology, python="python", versions={})
    hosts = Hostfile(entries=(HostEntry(host="node1", **entry),), source="hosts")
    return join(hosts, [facts], alone()).nodes[0]


def bindings(topology, nproc=None, **policy):
    return placement.bindings(only_node(topology), Policy(nproc_per_node=nproc, **policy))


@given(machines(), st.data())
def test_ranks_share_nothing_and_are_balanced(topology, data):
    cores = [core for group in usable_cores(only_node(topology), Policy()) for core in group]
    most = len(cores) if topology.quota_cpus is None else min(len(cores), max(1, int(topology.quota_cpus)))
    nproc = data.draw(st.integers(1, most))
    ranks = bindings(topology, nproc)
    cpus = [cpu for b in ranks for cpu in b.cpus]
    assert len(ranks) == nproc
    assert len(cpus) == len(set(cpus)) <= most
    assert set(cpus) <= {core.cpu for core in cores}
    sizes = [len(b.cpus) for b in ranks]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
    assert [b.threads for b in ranks] == sizes


@given(machines(), st.integers(1, 4))
def test_no_rank_straddles_when_ranks_are_a_multiple_of_nodes(topology, factor):
    groups = usable_cores(only_node(topology), Policy())
    nproc = factor * len(groups)
    if min(map(len, groups)) >= factor and topology.quota_cpus is None:
        ranks = bindings(topology, nproc)
        assert all(len(b.mem_nodes) == 1 for b in ranks)
        assert len({str(b.mem_nodes) for b in ranks}) == len(groups)


def large(topology, comm=0):
    """Sizes of the NUMA nodes that get a rank by default."""
    sizes = [len(group) for group in usable_cores(only_node(topology), Policy())]
    found = [size for size in sizes if size > comm and 2 * size >= max(sizes)]
    return found if 2 * sum(found) >= sum(sizes) else sizes


@given(machines())
def test_the_default_is_a_rank_per_node_that_is_not_far_smaller_than_another(topology):
    budget = topology.quota_cpus or 1000
    assert len(bindings(topology, None)) == min(len(large(topology)), max(1, int(budget)))


@given(machines(), st.integers(0, 2))
def test_the_default_leaves_less_than_a_half_of_large_nodes_idle(topology, comm):
    sizes = large(topology, comm)
    if topology.quota_cpus is None and min(sizes) > comm and 2 * min(sizes) >= max(sizes):
        ranks = bindings(topology, None, comm_cores=comm)
        assert len(ranks) == len(sizes)
        assert 2 * sum(len(b.cpus) + len(b.comm_cpus) for b in ranks) >= sum(sizes)


@given(machines(), st.integers(1, 6), st.integers(0, 2))
def test_so_many_ranks_as_there_are_cores_for_can_be_had(topology, nproc, comm):
    cores = sum(len(group) for group in usable_cores(only_node(topology), Policy()))
    if topology.quota_cpus is None and nproc * (1 + comm) <= cores:
        assert len(bindings(topology, nproc, comm_cores=comm)) == nproc
