"""A rank that the kernel kills for memory is told as such."""

from __future__ import annotations

from launching import BIN

from cluster.hosts import Hosts
from cluster.programs import HOG


def test_memory_that_runs_out_is_named(hosts: Hosts):
    for host in hosts.hosts[:2]:
        (host.disk / "work").mkdir()
        (host.disk / "work/program.py").write_text(HOG)
    hosts[1].limit_memory(300 << 20)
    words = ["--hosts", "node1,node2", "--nproc-per-node", "1", "--", "program.py"]
    done = hosts[0].run(str(BIN / "falcon-launch"), *words, cwd=hosts.disk / "work", timeout=60)
    assert done.returncode == 137
    told = done.stderr.splitlines()[0]
    assert told.startswith(
        "rank 1 (local_rank 0, host node2) failed first: out of memory, SIGKILL, cgroup oom_kill +1, peak memory 0."
    )
    assert told.endswith("GiB, last step 412")
