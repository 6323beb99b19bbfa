"""Other people's programs, unchanged, over hosts; and what is refused before they start."""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import time
from pathlib import Path

import pytest
from launching import BIN

from cluster.hosts import Hosts
from cluster.programs import ACCELERATE, DDP, DEEPSPEED, LOADERS
from falcon_dist import ccl_recipe

SHM = "/dev/shm"  # shared memory is mounted there
LAUNCH = str(BIN / "falcon-launch")
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")
TELL = "import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], os.environ['MASTER_ADDR'])"


@pytest.fixture
def launch(hosts: Hosts):
    def run(program: str | None, *words: str, nodes: int = 3, env: dict[str, str] | None = None, timeout: float = 90):
        for host in hosts.hosts[:nodes]:
            work = host.disk / "work"
            work.mkdir(exist_ok=True)
            if program is not None:
                (work / "program.py").write_text(program)
        environ = {**os.environ, **(env or {})}
        return hosts[0].run(LAUNCH, *words, cwd=hosts.disk / "work", env=environ, timeout=timeout)

    return run


THREE = ("--hosts", "node[1-3]", "--nproc-per-node", "1")


def test_a_stock_ddp_script(hosts: Hosts, launch):
    done = launch(DDP, *THREE, "--", "program.py", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(3):
        assert f"[rank {rank}] sum 3 cwd {hosts.disk}/work store {hosts[0].address}" in done.stdout


def test_a_stock_accelerate_script(launch):
    done = launch(ACCELERATE, *THREE, "--", "program.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ranks 3 seen 6") == 3


def test_a_stock_deepspeed_script(launch):
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None, "this test needs deepspeed; see make test-cluster"
    place = f"PYTHONPATH={Path(str(spec.origin)).parents[1]}"
    done = launch(DEEPSPEED, *THREE, "--env", place, "--", "program.py", timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ranks 3 steps 2") == 3


@pytest.mark.parametrize("backend", ["gloo", "ccl"])
def test_hosts_that_meet_over_ipv6(hosts: Hosts, launch, backend: str):
    """Named by address and with a user, and told to meet there: nothing goes by IPv4 that we choose."""
    first, second = hosts[0].address6, hosts[1].address6
    (hosts[0].disk / "work").mkdir(exist_ok=True)
    (hosts[0].disk / "work/hosts").write_text(f"root@[{first}] addr=[{first}] slots=1\n[{second}] slots=1\n")
    program = DDP.replace('("gloo")', f'("{backend}")')
    if backend == "ccl":
        program = "import falcon_dist.ccl\n" + program
    done = launch(program, "--hostfile", "hosts", "--", "program.py", "3", nodes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert f"[rank {rank}] sum 2 cwd {hosts.disk}/work store {first}" in done.stdout


def test_loaders_are_not_squeezed_onto_one_core(hosts: Hosts, launch):
    done = launch(LOADERS, "--hosts", "node2", "--nproc-per-node", "1", "--", "program.py", nodes=2)
    assert done.returncode == 0, done.stderr
    cpus = sorted(os.sched_getaffinity(0))
    assert f"loaders [{tuple(cpus)}] rank {cpus}" in done.stdout


def test_a_hostfile_with_slots_and_a_filter(hosts: Hosts, launch):
    (hosts[0].disk / "work").mkdir(exist_ok=True)
    (hosts[0].disk / "work/hosts").write_text("node1 slots=2\nnode2 slots=2 # c\nnode3\n")
    done = launch(TELL, "--hostfile", "hosts", "--exclude", "node3@node1:0", "--", "program.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" of 3 ") == 3
    over = launch(TELL, "--hostfile", "hosts", "--nproc-per-node", "3", "--", "program.py")
    assert over.returncode == 2
    assert over.stderr.startswith("falcon-launch: hosts:1: node1 takes 2 ranks, fewer than --nproc-per-node:")


def test_a_name_that_means_loopback_is_not_used(hosts: Hosts, launch):
    """Debian writes such a line for a host's own name."""
    own = hosts[0].folder / "hosts"
    own.write_text(f"127.0.0.1 localhost\n127.0.1.1 node1\n{hosts[1].address} node2\n")
    hosts[0].run("mount", "--bind", str(own), "/etc/hosts")
    done = launch(TELL, "--hosts", "node1,node2", "--nproc-per-node", "1", "--", "program.py", nodes=2)
    hosts[0].run("umount", "/etc/hosts")
    assert done.returncode == 0, done.stderr
    assert f"node1 calls itself loopback (/etc/hosts:2: 127.0.1.1 node1); the hosts meet at {hosts[0].address}" in (
        done.stdout
    )
    assert f"rank 1 of 2 {hosts[0].address}" in done.stdout


def test_an_address_that_cannot_be(hosts: Hosts, launch):
    (hosts[0].disk / "work").mkdir(exist_ok=True)
    for first, second, fault in (
        ("addr=127.0.0.1", "", 'hosts:1: other hosts cannot reach a loopback address: "127.0.0.1"'),
        ("addr=10.9.9.9", "", 'hosts:1: not an address of node1: "10.9.9.9"'),
        ("ifname=ens9", "", 'hosts:1: not an interface of node1: "ens9"; it has eth0, lo'),
        ("", "addr=10.9.9.9", 'hosts:2: not an address of node2: "10.9.9.9"'),
        ("", "ifname=ens9", 'hosts:2: not an interface of node2: "ens9"; it has eth0, lo'),
    ):
        (hosts[0].disk / "work/hosts").write_text(f"node1 {first}\nnode2 {second}\n")
        done = launch(TELL, "--hostfile", "hosts", "--", "program.py")
        assert (done.returncode, fault in done.stderr) == (2, True), done.stderr


def test_hosts_that_cannot_be_reached_are_all_named(launch):
    done = launch(TELL, "--hosts", "node1,nowhere,me@node2", "--", "program.py")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert "nowhere: no agent could be started: exit code 255" in done.stderr
    assert "node2: no agent could be started: exit code 255" in done.stderr
    assert "Permission denied" in done.stderr


def test_a_script_that_differs_or_is_missing(hosts: Hosts, launch):
    launch(TELL, "--dry-run", "--hosts", "node1", "--", "program.py")
    (hosts[1].disk / "work/program.py").write_text(TELL + "\n")
    differs = launch(None, *THREE, "--", "program.py")
    assert differs.returncode == 2
    assert differs.stderr.startswith('falcon-launch: hosts: not the same software: "script"; make them the same\n')
    (hosts[2].disk / "work/program.py").unlink()
    missing = launch(None, *THREE, "--", "program.py")
    assert missing.stderr == ('falcon-launch: node3: no such script: "program.py"; give the path of a Python program\n')


def test_the_same_machine_twice(hosts: Hosts, launch):
    done = launch(TELL, "--hosts", f"node2,{hosts[1].address}", "--", "program.py")
    assert done.returncode == 2
    assert f'hosts: the same machine as node2: "{hosts[1].address}"' in done.stderr


@pytest.fixture
def ssh_that(hosts: Hosts, tmp_path: Path):
    def make(does: str) -> dict[str, str]:
        script = tmp_path / "ssh"
        script.write_text(f"#!/bin/sh\n{does}\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    return make


def test_an_ssh_that_does_nothing(launch, ssh_that):
    done = launch(TELL, "--hosts", "node1,node2", "--", "program.py", env=ssh_that("echo welcome; exit 0"))
    assert done.returncode == 1
    assert 'node2: no agent could be started: exit code 0: "welcome"' in done.stderr


def test_an_ssh_that_hangs(launch, ssh_that):
    begun = time.monotonic()
    done = launch(TELL, "--hosts", "node1,node2", "--", "program.py", env=ssh_that("sleep 1000"))
    assert time.monotonic() - begun < 30
    assert (done.returncode, "node2: no answer within 20 s" in done.stderr) == (1, True)


def test_an_ssh_with_a_banner(launch, ssh_that):
    env = ssh_that('echo "{not json"; echo hello; exec /usr/bin/ssh "$@"')
    done = launch(TELL, "--hosts", "node1,node2", "--nproc-per-node", "1", "--", "program.py", env=env)
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2" in done.stdout


def test_the_doctor_finds_what_is_wrong_on_every_host(hosts: Hosts):
    hosts[2].run("mount", "-o", "remount,size=64m", SHM)
    done = hosts[0].run(str(BIN / "falcon"), "doctor", "--hosts", "node[1-3]", timeout=100)
    assert "problem" in done.stdout, done.stdout + done.stderr
    overview, problems = done.stdout.split("\n\n")
    assert [line.split()[0] for line in overview.splitlines()] == ["host", "node1", "node2", "node3"]
    assert overview.count("MB/s") == 6
    assert len(re.findall(r"\d+ MB/s \(ccl\)", overview)) == 3
    (shm,) = [line for line in problems.splitlines() if SHM in line]
    assert shm.startswith("node3  shared memory (/dev/shm): 0.1 GB left")
    assert shm.endswith("mount it larger (containers: --shm-size)")
    assert "packed" not in problems
    assert "torch" not in problems


def test_the_doctor_names_a_host_whose_own_torch_is_broken(hosts: Hosts, tmp_path: Path):
    """Hosts with the same packages have torch imported on one of them; a host with others does it for itself."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    (tmp_path / "functional.py").write_text("raise ImportError('cut short')\n")
    with hosts[1].overlaid(Path(str(spec.origin)).parent, tmp_path):
        done = hosts[0].run(str(BIN / "falcon"), "doctor", "--hosts", "node[1-3]", timeout=100)
    rows = [line.split("  ")[:2] for line in done.stdout.splitlines() if "does not work" in line]
    assert rows == [["node2", "torch does not work: ImportError: cut short"]], done.stdout + done.stderr


def test_the_doctor_asks_python_where_a_host_has_nothing_compiled(hosts: Hosts):
    with hosts[2].mounted("-t", "tmpfs", "tmpfs", str(ccl_recipe.cache_folder())):
        done = hosts[0].run(str(BIN / "falcon"), "doctor", "--hosts", "node[1-3]", timeout=100)
    assert len(re.findall(r"\d+ MB/s \(gloo\)", done.stdout)) == 3, done.stdout + done.stderr
    assert "torch" not in done.stdout
    assert "packed" not in done.stdout


def test_a_clock_that_is_half_a_minute_ahead(hosts: Hosts, launch):
    """Told by the doctor, and at the start of a run, which goes by monotonic time and does not mind."""
    assert FAKETIME.is_file(), "this test needs libfaketime; see make test-cluster"
    ahead = {"LD_PRELOAD": str(FAKETIME), "FAKETIME": "+30s", "DONT_FAKE_MONOTONIC": "1"}
    with hosts[1].login_environment(ahead):
        told = hosts[0].run(str(BIN / "falcon"), "doctor", "--quick", "--hosts", "node[1-3]", timeout=60)
        done = launch(TELL, *THREE, "--", "program.py")
    (problem,) = [line for line in told.stdout.splitlines() if "clock" in line and "off" in line]
    assert problem.startswith("node2  clock +30.0 s off"), told.stdout
    assert done.returncode == 0, done.stderr
    assert "node2: its clock is +30 s off" in done.stdout + done.stderr
