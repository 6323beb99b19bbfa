"""The placement that machines get which we do not have: ranks, their communication cores, their memory."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_launcher_placement import machines, only_node
from topologies.trees import write_tree

from launcher import explain, sysfs
from launcher.cluster import HostFacts, join
from launcher.cpuset import CpuSet
from launcher.errors import UserError
from launcher.hostfile import parse, this_machine
from launcher.network import alone
from launcher.placement import Policy, bindings, usable_cores

XEON = {"sockets": 2, "cores_per_node": 28, "smt": 2}
SNC4_HBM = {"sockets": 2, "nodes_per_socket": 4, "cores_per_node": 14, "smt": 2}

UNEVEN = {"sockets": 2, "cores_per_node": [1, 7]}

MACHINES = {
    # name: (tree, policy, [(cpus, comm cpus, memory nodes) of each rank])
    "one socket, no SMT": ({}, {}, [("0-2", "3", "0")]),
    "2 sockets, SMT split": (XEON, {}, [("0-26", "27", "0"), ("28-54", "55", "1")]),
    "2 sockets, SMT adjacent": (
        {"sockets": 2, "cores_per_node": 4, "smt": 2, "adjacent": True},
        {},
        [("0,2,4", "6", "0"), ("8,10,12", "14", "1")],
    ),
    "2 sockets, all threads": (
        {"sockets": 2, "smt": 2},
        {"use_logical_cores": True},
        [("0-2,8-10", "3", "0"), ("4-6,12-14", "7", "1")],
    ),
    "SNC-2": (
        {"sockets": 2, "nodes_per_socket": 2},
        {},
        [("0-2", "3", "0"), ("4-6", "7", "1"), ("8-10", "11", "2"), ("12-14", "15", "3")],
    ),
    "SNC-2, a rank per socket": (
        {"sockets": 2, "nodes_per_socket": 2},
        {"per": "socket"},
        [("0-6", "7", "0-1"), ("8-14", "15", "2-3")],
    ),
    "SNC-3": (
        {"sockets": 2, "nodes_per_socket": 3, "cores_per_node": 2},
        {},
        [(str(2 * i), str(2 * i + 1), str(i)) for i in range(6)],
    ),
    "SNC-3, a rank per socket": (
        {"sockets": 2, "nodes_per_socket": 3, "cores_per_node": 2},
        {"per": "socket"},
        [("0-4", "5", "0-2"), ("6-10", "11", "3-5")],
    ),
    "SNC-4 and HBM flat": (
        SNC4_HBM | {"memory_only": tuple(range(8, 16))},
        {},
        [(f"{14 * i}-{14 * i + 12}", str(14 * i + 13), str(i)) for i in range(8)],
    ),
    "12 NUMA nodes": (
        {"sockets": 2, "nodes_per_socket": 6, "cores_per_node": 2},
        {},
        [(str(2 * i), str(2 * i + 1), str(i)) for i in range(12)],
    ),
    "node ids with holes": ({"sockets": 2, "node_ids": [0, 8]}, {}, [("0-2", "3", "0"), ("4-6", "7", "8")]),
    "offline cpus": ({"sockets": 2, "offline": "1,6-7"}, {}, [("0,2", "3", "0"), ("4", "5", "1")]),
    "threads offline": ({"sockets": 2, "smt": 2, "offline": "8-15"}, {}, [("0-2", "3", "0"), ("4-6", "7", "1")]),
    "cpuset without cpu 0": ({"sockets": 2, "allowed": "1-3,5-7"}, {}, [("1-2", "3", "0"), ("5-6", "7", "1")]),
    "quota of 3.5": ({"sockets": 2, "cpu_max": "350000 100000"}, {"comm_cores": 0}, [("0-1", "", "0"), ("4", "", "1")]),
    "no NUMA": ({"sockets": 2, "numa": False}, {}, [("0-6", "7", "")]),
    "no NUMA, a rank per socket": (
        {"sockets": 2, "numa": False},
        {"per": "socket"},
        [("0-2", "3", ""), ("4-6", "7", "")],
    ),
    "uneven sockets": (
        {"sockets": 2, "cores_per_node": [6, 3]},
        {},
        [("0-2", "3", "0"), ("6-7", "8", "1")],
    ),
    "a NUMA node of one core": (UNEVEN, {}, [("1-6", "7", "1")]),
    "a NUMA node of one core, no communication": (UNEVEN, {"comm_cores": 0}, [("1-7", "", "1")]),
    "a NUMA node of one core that is asked for": (
        UNEVEN,
        {"comm_cores": 0, "by_slots": False},
        [("0", "", "0"), ("1-2", "", "1")],
    ),
    "a NUMA node of one core, two ranks": (UNEVEN, {"nproc_per_node": 2}, [("1-3", "4", "1"), ("5-6", "7", "1")]),
    "more ranks than fit the NUMA nodes": (
        {"sockets": 2, "cores_per_node": 3},
        {"nproc_per_node": 3},
        [("0", "1", "0"), ("2", "3", "0-1"), ("4", "5", "1")],
    ),
    "socket 1 only": (XEON, {"sockets": CpuSet.parse("1")}, [("28-54", "55", "1")]),
    "two NUMA nodes of eight": (
        SNC4_HBM,
        {"numa_nodes": CpuSet.parse("2,5")},
        [("28-40", "41", "2"), ("70-82", "83", "5")],
    ),
    "cpus by list": (XEON, {"cores_list": CpuSet.parse("4-7,32-35")}, [("4-6", "7", "0"), ("32-34", "35", "1")]),
    "two cores a rank": (XEON, {"nproc_per_node": 2, "ncores_per_rank": 2}, [("0-1", "2", "0"), ("28-29", "30", "1")]),
}


@pytest.mark.parametrize("name", MACHINES)
def test_machines(name, tmp_path):
    tree, policy, expected = MACHINES[name]
    topology = sysfs.read(write_tree(tmp_path, **tree))
    found = bindings(only_node(topology), Policy(**{"comm_cores": 1, **policy}))
    assert [(str(b.cpus), str(b.comm_cpus), str(b.mem_nodes)) for b in found] == expected
    assert [b.threads for b in found] == [len(b.cpus) for b in found]


@given(machines(), st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_communication_cores_are_the_ranks_own(topology, nproc, comm, logical):
    node = only_node(topology)
    policy = Policy(nproc_per_node=nproc, comm_cores=comm, use_logical_cores=logical)
    try:
        found = bindings(node, policy)
    except UserError:
        return
    numa_of = {cpu: c.numa_node for group in usable_cores(node, policy) for c in group for cpu in c.cpus}
    core_of = {cpu: c.cpu for group in usable_cores(node, policy) for c in group for cpu in c.cpus}
    taken = [core for b in found for core in {core_of[c] for c in b.cpus} | {core_of[c] for c in b.comm_cpus}]
    assert len(taken) == len(set(taken))
    for b in found:
        assert len(b.comm_cpus) == comm
        assert not b.comm_cpus & b.cpus
        assert {numa_of[c] for c in (*b.comm_cpus, *b.cpus)} & topology.mems_allowed.ids == b.mem_nodes.ids
        assert b.cpus.ids <= topology.allowed.ids
    cores = [len({core_of[c] for c in b.cpus}) for b in found]
    assert max(cores) - min(cores) <= 1


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"sockets": CpuSet.parse("2")}, ["--sockets", '"2"', 'it has "0-1"']),
        ({"numa_nodes": CpuSet.parse("0,9")}, ["--numa-nodes", '"9"']),
        ({"cores_list": CpuSet.parse("0,99")}, ["--cores-list", '"99"', "allowed cpu"]),
        ({"nproc_per_node": 4, "comm_cores": 2}, ["--nproc-per-node", "communication", '"4"', "use 2 or fewer"]),
        ({"nproc_per_node": 2, "ncores_per_rank": 5}, ["--ncores-per-rank", "4 cores", '"5"']),
    ],
)
def test_what_a_machine_cannot_give(policy, words, tmp_path):
    node = only_node(sysfs.read(write_tree(tmp_path, sockets=2)))
    with pytest.raises(UserError) as fault:
        bindings(node, Policy(**policy))
    assert all(word in str(fault.value) for word in words), str(fault.value)


@pytest.mark.parametrize("per", ["socket", "numa_node"])
def test_a_fault_names_what_was_given(tmp_path, per):
    node = only_node(sysfs.read(write_tree(tmp_path, **UNEVEN)))
    with pytest.raises(UserError, match=r'^--ccl-worker-count: node1 has 0 cores for a rank.*: "1"'):
        bindings(node, Policy(by_slots=False, per=per, comm_cores=1))


def test_cores_of_a_node_too_small_for_a_rank_are_explained(tmp_path):
    topology = sysfs.read(write_tree(tmp_path, **UNEVEN))
    cluster = join(parse("node1", "hosts"), [facts_of(topology)], alone())
    assert explain.unused(cluster, Policy()) == [
        ("node1", "0", "far fewer than another NUMA node has; --nproc-per-node numa gives each a rank")
    ]


def test_a_socket_too_small_for_a_rank_is_explained_where_a_numa_node_spans_both(tmp_path):
    topology = sysfs.read(write_tree(tmp_path, **UNEVEN))
    one_domain = tuple(
        dataclasses.replace(s, numa_nodes=(dataclasses.replace(s.numa_nodes[0], numa_node=0),))
        for s in topology.sockets
    )
    cluster = join(parse("node1", "hosts"), [facts_of(dataclasses.replace(topology, sockets=one_domain))], alone())
    policy = Policy(per="socket")
    assert [str(b.cpus) for b in bindings(cluster.nodes[0], policy)] == ["1-7"]
    assert explain.unused(cluster, policy) == [
        ("node1", "0", "far fewer than another NUMA node has; --nproc-per-node numa gives each a rank")
    ]


def test_threads_of_an_unused_core_are_explained_with_it(tmp_path):
    topology = sysfs.read(write_tree(tmp_path, sockets=2, cores_per_node=[4, 4], smt=2))
    cluster = join(parse("node1", "hosts"), [facts_of(topology)], alone())
    rows = explain.unused(cluster, Policy(use_logical_cores=True, ncores_per_rank=2, comm_cores=1))
    assert rows == [
        ("node1", "2,6,10,14", "kept free for collective workers (--ccl-worker-count)"),
        ("node1", "3,7,11,15", "--ncores-per-rank 2"),
    ]


SLOTS = [
    # entry, --nproc-per-node, cpus of each rank (or the fault)
    ({"slots": 4}, None, ["0-1", "2-3", "4-5", "6-7"]),
    ({"slots": 4}, 2, ["0-3", "4-7"]),
    ({"slots": 2}, 3, 'takes 2 ranks, fewer than --nproc-per-node: "3"'),
    ({"slots": 2, "max_slots": 4}, 4, ["0-1", "2-3", "4-5", "6-7"]),
    ({"slots": 4, "seats": (1, 3)}, None, ["2-3", "6-7"]),
    ({"slots": 4, "seats": (1, 3)}, 1, ["2-3"]),
    ({"slots": 4, "seats": (1, 3)}, 3, "takes 2 ranks"),
    ({"cores": CpuSet.parse("2-5")}, None, ["2-3", "4-5"]),
    ({"cores": CpuSet.parse("9")}, None, 'no such allowed cpu: "9"'),
    ({}, None, ["0-3", "4-7"]),
]


@pytest.mark.parametrize(("entry", "nproc", "expected"), SLOTS)
def test_slots(entry, nproc, expected, tmp_path):
    node = only_node(sysfs.read(write_tree(tmp_path, sockets=2)), line=7, **entry)
    if isinstance(expected, list):
        assert [str(b.cpus) for b in bindings(node, Policy(nproc_per_node=nproc))] == expected
        return
    with pytest.raises(UserError, match=f"^hosts:7: .*{expected}"):
        bindings(node, Policy(nproc_per_node=nproc))


@pytest.mark.parametrize(("slots", "expected"), [(4, 2), (2, 2), (1, "takes 1 ranks, fewer than")])
def test_a_word_counts_more_than_slots(slots, expected, tmp_path):
    node = only_node(sysfs.read(write_tree(tmp_path, sockets=2, nodes_per_socket=2)), slots=slots)
    policy = Policy(by_slots=False, per="socket")
    if isinstance(expected, int):
        assert [str(b.mem_nodes) for b in bindings(node, policy)] == ["0-1", "2-3"]
        return
    with pytest.raises(UserError, match=expected):
        bindings(node, policy)


def test_every_unused_cpu_is_explained(tmp_path):
    tree = {"sockets": 2, "cores_per_node": [4, 6], "smt": 2, "offline": "3", "allowed": "0-2,4-8,10-19"}
    topology = sysfs.read(write_tree(tmp_path, **tree))
    cluster = join(parse("node1 cores=0-2,4-8,10-18", "hosts"), [facts_of(topology)], alone())
    rows = explain.unused(cluster, Policy(comm_cores=1))
    assert rows == [
        ("node1", "3", "offline"),
        ("node1", "9", "outside this process's affinity mask or cpuset"),
        ("node1", "19", "left out by cores= (hosts:1)"),
        ("node1", "10-12,14-18", "another thread of a core that is used; --use-logical-cores takes it"),
        ("node1", "7,13", "kept free for collective workers (--ccl-worker-count)"),
        ("node1", "8", "ranks are kept equal: a step lasts as long as its slowest rank"),
    ]
    used = [cpu for b in bindings(cluster.nodes[0], Policy(comm_cores=1)) for cpu in b.cpus]
    told = [cpu for _, cpus, _ in rows for cpu in CpuSet.parse(cpus)]
    assert sorted([*used, *told]) == sorted((topology.cpus | topology.offline).ids)


def facts_of(topology):
    return HostFacts(topology=topology, python="python", versions={})


def test_the_flags_reach_the_plan(tmp_path):
    write_tree(tmp_path / "m", **XEON)
    words = [*("--topology", str(tmp_path / "m")), "--dry-run", "--json", "--ccl-worker-count", "2", "--sockets", "1"]
    words += ["--ncores-per-rank", "4", "--", "x.py"]
    command = [str(Path(sys.executable).parent / "falcon-launch"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (rank,) = json.loads(done.stdout)["nodes"][0]["ranks"]
    assert (rank["cpus"], rank["comm_cpus"], rank["mem_nodes"], rank["threads"]) == ("28-31", "32-33", "1", 4)
    names = ("CCL_WORKER_COUNT", "CCL_WORKER_AFFINITY", "CCL_WORKER_MEM_AFFINITY", "OMP_NUM_THREADS")
    assert [rank["env"][name] for name in names] == ["2", "32,33", "1,1", "4"]


def test_this_machine_alone_is_the_default(tmp_path):
    topology = sysfs.read(write_tree(tmp_path))
    assert [str(b.cpus) for b in bindings(join(this_machine(), [facts_of(topology)], alone()).nodes[0], Policy())] == [
        "0-3"
    ]
