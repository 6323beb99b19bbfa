"""Real binding on a machine with several sockets and NUMA nodes: where ranks run and where their memory is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cluster import guest

PYTHON = str(Path(sys.executable).resolve())
# Two sockets with two NUMA nodes each, cpus dealt out in pieces, and one NUMA node without cpus.
MACHINE = guest.Machine(sockets=2, numa_nodes=((0, 1), (2, 3), (4, 5), (6, 7), ()))
WHERE = """
import ctypes, json, mmap, os, re
held = mmap.mmap(-1, 16 << 20)
held.write(bytes(16 << 20))
mode, mask = ctypes.c_int(), (ctypes.c_ulong * 16)()
GET_MEMPOLICY = 239
assert ctypes.CDLL(None).syscall(GET_MEMPOLICY, ctypes.byref(mode), mask, 1024, None, 0) == 0
pages = {}
for line in open("/proc/self/numa_maps"):
    if "anon=" in line and "file=" not in line:
        for node, count in re.findall(r" N(\\d+)=(\\d+)", line):
            pages[node] = pages.get(node, 0) + int(count)
told = {"rank": os.environ["RANK"], "cpus": sorted(os.sched_getaffinity(0)), "mask": mask[0], "pages": pages}
print("where " + json.dumps(told), flush=True)
"""


@pytest.mark.slow
def test_ranks_and_their_memory_are_where_the_plan_says(tmp_path: Path) -> None:
    lacking = guest.missing()
    assert not lacking, f"this test needs {', '.join(lacking)}; see make test-numa"
    launch = [PYTHON, "-m", "launcher.cli"]
    program = ["--report-bindings", "--", "/where.py"]
    done = guest.run(
        MACHINE,
        [
            [*launch, "--nproc-per-node", "numa", *program],
            [*launch, "--nproc-per-node", "socket", *program],
            [*launch, "--nproc-per-node", "4", "--ccl-worker-count", "1", *program],
        ],
        {"/where.py": WHERE},
        tmp_path,
    )
    assert [each["code"] for each in done] == [0, 0, 0], done
    per_numa_node, per_socket, with_workers = (ranks_of(each["out"]) for each in done)
    assert [rank["cpus"] for rank in per_numa_node] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [rank["mask"] for rank in per_numa_node] == [1, 2, 4, 8]
    assert [rank["cpus"] for rank in per_socket] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [rank["mask"] for rank in per_socket] == [0b11, 0b1100]
    assert [len(rank["cpus"]) for rank in with_workers] == [1, 1, 1, 1]
    for ranks in (per_numa_node, with_workers):
        assert [set(rank["pages"]) for rank in ranks] == [{"0"}, {"1"}, {"2"}, {"3"}]


def ranks_of(text: str) -> list[dict[str, object]]:
    told = [json.loads(line.partition("where ")[2]) for line in text.splitlines() if "where {" in line]
    return sorted(told, key=lambda rank: int(rank["rank"]))
