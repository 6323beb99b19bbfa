import dataclasses

import pytest
from topologies.trees import write_tree

from launcher import sysfs
from launcher.cluster import HostFacts
from launcher.cpuset import CpuSet
from launcher.diagnosis import Findings, overview, problems

TORCH = {
    "all_reduce": {"backend": "ccl", "bytes_per_s": 8.7e8},
    "leak": 0.0,
    "bf16_kernel": "brg_matmul:avx10_1_512_amx",
    "torch": "2.13.0",
}
PLACE = {"disk_bytes": 1 << 40, "writable": True, "place": "/runs"}
LIMITS = {"open_files": -1, "processes": 65536, "shm_bytes": 1 << 34, "memory_bytes": 1 << 38, "load": 0.1}
GOOD = {"code": "c", "isa": "amx_bf16", "torch": TORCH, **PLACE, **LIMITS}


@pytest.fixture
def found(tmp_path):
    topology = sysfs.read(write_tree(tmp_path, sockets=2))

    def make(host, facts=None, rate=1e9, offset=0.001, unreached=(), **examined):
        known = {"python": "/py", "python_version": "3.11.7", "versions": {"torch": "2.13.0"}, **(facts or {})}
        return Findings(
            host=host,
            facts=HostFacts(topology=topology, **known),
            examined={**GOOD, **examined},
            clock_offset_s=offset,
            unreached=unreached,
            link_bytes_per_s=rate,
        )

    return make


def test_hosts_in_good_health(found):
    assert problems([found("a"), found("b"), found("c")]) == []
    assert overview([found("a")])[0] == (
        *(
            "a",
            "2 x 2 x 8",
            "8",
            "256 GiB",
            "amx_bf16",
            "AMX: brg_matmul:avx10_1_512_amx",
            "+1 ms",
            "1000 MB/s",
            "870 MB/s (ccl)",
        ),
    )


def test_a_part_of_a_busy_machine_and_the_usual_limits_are_no_problem(found):
    part = found("a", load=3.0, open_files=1024)
    mask = dataclasses.replace(part.facts.topology, allowed=CpuSet.parse("0-1"))
    assert problems([dataclasses.replace(part, facts=dataclasses.replace(part.facts, topology=mask))]) == []


@pytest.mark.parametrize(
    ("ill", "problem", "cure"),
    [
        ({"offset": -7.5}, "clock -7.5 s off", "chrony"),
        ({"open_files": 512}, "open files limited to 512", "ulimit -n"),
        ({"processes": 100}, "processes limited to 100", "ulimit -u"),
        ({"shm_bytes": 64 << 20}, "shared memory (/dev/shm): 0.1 GB left", "--shm-size"),
        ({"disk_bytes": 1 << 30}, "1.1 GB of disk left at /runs", "--runs-dir"),
        ({"writable": False}, "/runs cannot be written", "--runs-dir"),
        ({"load": 7.0}, "load 7.0 on 8 cpus", "end what else"),
        ({"torch": {"fault": "No module"}}, "torch does not work: No module", "install"),
        ({"torch": {"leak": 0.2, "bf16_kernel": "brg_matmul:avx512_core_bf16"}}, "see each other (0.2)", "pinned"),
        (
            {"torch": {"leak": 0, "bf16_kernel": "jit:avx2"}},
            "bf16 products run on AVX2 (jit:avx2)",
            "ONEDNN_MAX_CPU_ISA",
        ),
        (
            {"torch": TORCH | {"all_reduce": {"fault": "timed out"}}},
            "all_reduce with the other hosts fails: timed",
            "ports",
        ),
        ({"unreached": ("a", "c")}, "does not reach a, c", "firewall"),
        ({"facts": {"python_version": "3.12.0"}}, "python 3.12, others have 3.11", "install 3.11"),
        ({"facts": {"versions": {"torch": "2.8.0"}}}, "torch 2.8.0, others have 2.13.0", "install 2.13.0"),
        ({"code": "d"}, "falcon-dist code d, others have c", "install"),
        ({"rate": 1e7}, "link 10 MB/s, others 1000", "cable"),
    ],
)
def test_each_problem_is_told_with_its_cure(found, ill, problem, cure):
    (row,) = problems([found("a"), found("b", **ill), found("c")])
    assert row[0] == "b"
    assert problem in row[1]
    assert cure in row[2]


def test_what_needs_torch_may_be_left_out(found):
    assert problems([found("a", torch={})]) == []
