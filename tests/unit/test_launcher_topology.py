import json

import pytest
from topologies.trees import put, write_tree

from launcher import sysfs
from launcher.binding import Binding
from launcher.cluster import HostFacts, Node, join
from launcher.cpuset import CpuSet
from launcher.errors import UserError
from launcher.hostfile import this_machine
from launcher.network import alone
from launcher.placement import Policy, bindings, usable_cores
from launcher.topology import Topology


def seats(root, nproc=None) -> list[Binding]:
    return bindings(node_of(sysfs.read(root)), Policy(nproc_per_node=nproc))


def node_of(topology) -> Node:
    facts = HostFacts(topology=topology, python="python", versions={})
    return join(this_machine(), [facts], alone()).nodes[0]


CASES = {
    # name: (tree, ranks asked for, [(cpus, mem_nodes) of each rank])
    "one domain": ({}, None, [("0-3", "0")]),
    "two sockets": ({"sockets": 2}, None, [("0-3", "0"), ("4-7", "1")]),
    "two sockets, four ranks": (
        {"sockets": 2},
        4,
        [("0-1", "0"), ("2-3", "0"), ("4-5", "1"), ("6-7", "1")],
    ),
    "one rank over both sockets": ({"sockets": 2}, 1, [("0-7", "0-1")]),
    "SNC2, a rank per socket": (
        {"sockets": 2, "nodes_per_socket": 2, "cores_per_node": 2},
        2,
        [("0-3", "0-1"), ("4-7", "2-3")],
    ),
    "SMT split": ({"smt": 2}, None, [("0-3", "0")]),
    "SMT adjacent": ({"smt": 2, "adjacent": True}, None, [("0,2,4,6", "0")]),
    "SMT adjacent, two ranks": ({"smt": 2, "adjacent": True}, 2, [("0,2", "0"), ("4,6", "0")]),
    "second thread only": ({"smt": 2, "allowed": "4-5"}, None, [("4-5", "0")]),
    "node ids with a hole": ({"sockets": 2, "node_ids": [0, 8]}, None, [("0-3", "0"), ("4-7", "8")]),
    "nodes 10 and 11": (
        {"sockets": 2, "nodes_per_socket": 6, "cores_per_node": 1},
        None,
        [(str(i), str(i)) for i in range(12)],
    ),
    "memory-only node": ({"memory_only": (1,)}, None, [("0-3", "0")]),
    "offline cpus": ({"offline": "1"}, None, [("0,2-3", "0")]),
    "a node whose cpus are offline": ({"sockets": 2, "offline": "4-7"}, None, [("0-3", "0")]),
    "no NUMA": ({"sockets": 2, "numa": False}, None, [("0-7", "")]),
    "cpuset without cpu 0": ({"allowed": "1-3"}, 3, [("1", "0"), ("2", "0"), ("3", "0")]),
    "cpuset of one socket": ({"sockets": 2, "allowed": "5-6"}, None, [("5-6", "1")]),
    "quota 3.5": ({"sockets": 2, "cpu_max": "350000 100000"}, None, [("0-1", "0"), ("4", "1")]),
    "quota below one cpu": ({"sockets": 2, "cpu_max": "50000 100000"}, None, [("0", "0")]),
    "no quota": ({"cpu_max": "max 100000"}, None, [("0-3", "0")]),
    "memory of the other node only": ({"sockets": 2, "mems_allowed": "1"}, None, [("0-3", ""), ("4-7", "1")]),
    "uneven nodes": ({"sockets": 2, "allowed": "0-3,4-5"}, None, [("0-2", "0"), ("4-5", "1")]),
    "three ranks on two nodes": ({"sockets": 2}, 3, [("0-1", "0"), ("2-3", "0"), ("4-5", "1")]),
}


@pytest.mark.parametrize("name", CASES)
def test_seats(name, tmp_path):
    tree, nproc, expected = CASES[name]
    found = [(str(b.cpus), str(b.mem_nodes)) for b in seats(write_tree(tmp_path, **tree), nproc)]
    assert found == expected


@pytest.mark.parametrize("name", CASES)
def test_json_round_trip(name, tmp_path):
    topology = sysfs.read(write_tree(tmp_path, **CASES[name][0]))
    assert Topology.from_json(json.loads(json.dumps(topology.to_json())), "here") == topology


def test_a_quota_of_cgroup_v1(tmp_path):
    write_tree(tmp_path)
    put(tmp_path, "proc/self/cgroup", "4:memory:/a\n1:cpu,cpuacct:/a/b")
    put(tmp_path, "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", 250000)
    put(tmp_path, "sys/fs/cgroup/cpu/a/cpu.cfs_period_us", 100000)
    put(tmp_path, "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us", -1)
    assert sysfs.read(tmp_path).quota_cpus == 2.5


def test_a_quota_of_a_parent_group(tmp_path):
    write_tree(tmp_path)
    put(tmp_path, "proc/self/cgroup", "0::/slice/unit")
    put(tmp_path, "sys/fs/cgroup/slice/cpu.max", "150000 100000")
    put(tmp_path, "sys/fs/cgroup/slice/unit/cpu.max", "max 100000")
    assert sysfs.read(tmp_path).quota_cpus == 1.5


@pytest.mark.parametrize(
    ("tree", "nproc", "numbers"),
    [
        ({"cores_per_node": 2}, 3, ['"3"', "2 usable physical cores"]),
        ({"smt": 2, "cores_per_node": 2}, 3, ['"3"', "2 usable"]),
        ({"cpu_max": "250000 100000"}, 3, ['"3"', "quota 2.5", "use 2 or fewer"]),
    ],
)
def test_more_ranks_than_cores_names_the_numbers(tree, nproc, numbers, tmp_path):
    with pytest.raises(UserError) as fault:
        seats(write_tree(tmp_path, **tree), nproc)
    assert all(number in str(fault.value) for number in numbers)


def test_this_machine_can_be_read():
    topology = sysfs.read()
    assert topology.allowed.ids <= topology.cpus.ids
    assert usable_cores(node_of(topology), Policy())


def test_saved_topologies_by_path_and_by_host(tmp_path):
    tree = write_tree(tmp_path / "a=b", cores_per_node=2)
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(sysfs.read(tree).to_json()))
    for given in (str(tree), f"localhost={tree}", str(saved), f"localhost={saved}"):
        assert sysfs.load_for(["localhost"], [given])["localhost"].cpus == CpuSet.parse("0-1")


@pytest.mark.parametrize(("given", "fault"), [("other=x", "no such host"), ("nowhere.json", "cannot be read")])
def test_a_topology_that_is_none(given, fault):
    with pytest.raises(UserError, match=fault):
        sysfs.load_for(["localhost"], [given])


def test_a_folder_with_what_no_kernel_writes_is_told_in_a_line(tmp_path):
    put(write_tree(tmp_path), "sys/devices/system/cpu/online", "all")
    with pytest.raises(UserError, match=r'^--topology: holds what no kernel writes: ".*"; not a list of cpus.*"all"$'):
        sysfs.load(tmp_path)
