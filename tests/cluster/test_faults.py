"""Ranks, agents, launchers and links that die: who is named, how soon all is quiet, and that nothing is left."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from launching import BIN

from cluster.hosts import Hosts
from cluster.machine import environment_of, wait_until
from cluster.programs import DDP, SLEEP

LAUNCH, FALCON = str(BIN / "falcon-launch"), str(BIN / "falcon")
CANARY = "canary-3f9a1c"


class Run:
    """A launcher on node1 whose ranks run a program on the first hosts."""

    def __init__(self, hosts: Hosts, program: str, *args: str, nodes: int = 2, flags: tuple[str, ...] = ()) -> None:
        self.hosts = hosts
        for host in hosts.hosts[:nodes]:
            (host.disk / "work").mkdir(exist_ok=True)
            (host.disk / "work/program.py").write_text(program)
        self.work = hosts[0].disk / "work"
        named = ["--hosts", f"node[1-{nodes}]", "--nproc-per-node", "1", *flags]
        words = [LAUNCH, *named, "--", "program.py", *args]
        env = {**os.environ, "HF_TOKEN": CANARY}
        self.process = hosts[0].enter(*words, cwd=hosts.disk / "work", env=env)
        self.nodes = nodes

    def ready(self) -> Run:
        """Waits until every rank has said so."""
        wait_until(lambda: len(self.ranks()) == self.nodes and self._said() >= self.nodes, 60, "ready ranks")
        return self

    def _said(self) -> int:
        newest = max((self.work / "runs").glob("*"), key=lambda p: p.stat().st_mtime)
        return sum("ready" in path.read_text() for path in newest.glob("attempt_1/rank_*/stdout"))

    def ranks(self) -> list[int]:
        return [pid for host in self.hosts for pid in host.find("program.py") if "GROUP_RANK=" in environment_of(pid)]

    def rank(self, number: int) -> int:
        (pid,) = [pid for pid in self.ranks() if f"\nRANK={number}\n" in f"\n{environment_of(pid)}\n"]
        return pid

    def launcher(self) -> int:
        return next(p for p in self.hosts[0].find("falcon-launch", "program.py") if not is_wrapper(p))

    def left(self) -> list[int]:
        """Processes of the run that still live, helpers included."""
        signs = ("program.py", "launcher.agent", "falcon_dist.store", "sleep 1000")
        return [pid for host in self.hosts for sign in signs for pid in host.find(sign)]

    def end(self, timeout: float) -> tuple[int, str, str, float]:
        """Exit code, output, errors, and the seconds until nothing was left."""
        begun = time.monotonic()
        out, err = self.process.communicate(timeout=timeout)
        wait_until(lambda: not self.left(), max(0.1, timeout - (time.monotonic() - begun)), "the end of all")
        return self.process.returncode, out, err, time.monotonic() - begun


def is_wrapper(pid: int) -> bool:
    return "nsenter" in Path(f"/proc/{pid}/cmdline").read_text()


def test_a_killed_rank_is_named_and_all_hosts_are_down(hosts: Hosts):
    run = Run(hosts, SLEEP, "deaf", "apart", nodes=3).ready()
    os.kill(run.rank(1), signal.SIGKILL)
    code, _, err, seconds = run.end(timeout=10)
    assert code == 137
    assert err.splitlines()[0] == "rank 1 (local_rank 0, host node2) failed first: SIGKILL, last step 412"
    assert "other ranks: 2 SIGKILL" in err
    assert seconds < 10


def test_the_killed_one_is_named_although_its_peers_fail_of_it(hosts: Hosts):
    run = Run(hosts, DDP, "100000", nodes=3).ready()
    os.kill(run.rank(2), signal.SIGKILL)
    code, _, err, _ = run.end(timeout=10)
    assert (code, err.splitlines()[0]) == (137, "rank 2 (local_rank 0, host node3) failed first: SIGKILL")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_ends_all_hosts(hosts: Hosts, number: signal.Signals):
    run = Run(hosts, SLEEP).ready()
    os.kill(run.launcher(), number)
    code, _, err, _ = run.end(timeout=8)
    assert code == 128 + number
    assert f"interrupted by {number.name}" in err


def test_a_killed_launcher_leaves_nothing_anywhere(hosts: Hosts):
    run = Run(hosts, SLEEP, "apart", nodes=3).ready()
    os.kill(run.launcher(), signal.SIGKILL)
    assert run.end(timeout=15)[0] != 0


def test_a_killed_ssh_client_ends_all_and_is_told(hosts: Hosts):
    run = Run(hosts, SLEEP, "apart", nodes=3).ready()
    (client,) = hosts[0].find("ssh", "node2", "launcher.agent")
    os.kill(client, signal.SIGKILL)
    code, _, err, _ = run.end(timeout=15)
    assert (code, err.splitlines()[0]) == (1, "node2: the agent is gone: SIGKILL")


@pytest.mark.parametrize("which", ["agent", "keeper"])
def test_a_killed_agent_ends_all_and_is_told(hosts: Hosts, which: str):
    run = Run(hosts, SLEEP, "apart", nodes=3).ready()
    both = hosts[1].find("launcher.agent")
    children = {p: Path(f"/proc/{p}/task/{p}/children").read_text().split() for p in both}
    keeper = next(p for p in both if {int(c) for c in children[p]} & set(both))
    agent = next(p for p in both if p != keeper and str(p) in children[keeper])
    os.kill(agent if which == "agent" else keeper, signal.SIGKILL)
    code, _, err, _ = run.end(timeout=15)
    assert code == 1
    assert err.startswith("node2: the agent is gone: ")


def test_a_cut_link_leaves_no_rank_on_either_side(hosts: Hosts):
    run = Run(hosts, SLEEP, "deaf", "apart", nodes=3).ready()
    begun = time.monotonic()
    hosts[1].cut()
    try:
        wait_until(lambda: not hosts[1].find("program.py") + hosts[1].find("sleep 1000"), 15, "ranks of the cut host")
        _, err = run.process.communicate(timeout=max(0.1, 15 - (time.monotonic() - begun)))
        wait_until(lambda: not run.ranks(), 15 - (time.monotonic() - begun), "the end of all ranks")
    finally:
        hosts[1].heal()
    assert run.process.returncode == 1
    assert err.splitlines()[0] == "node2: nothing heard for 10 s: the host, its link or its agent is dead"
    wait_until(lambda: not run.left(), 20)


def test_ps_and_kill(hosts: Hosts):
    run = Run(hosts, SLEEP, flags=("--run-id", "one")).ready()
    listed = hosts[0].run(FALCON, "ps", cwd=hosts.disk / "work")
    (row,) = [line for line in listed.stdout.splitlines() if line.startswith("one ")]
    assert "node1,node2" in row
    assert row.endswith("running")
    killed = hosts[0].run(FALCON, "kill", "one", cwd=hosts.disk / "work")
    assert (killed.returncode, killed.stdout) == (0, "node1: the launcher and all ranks ended\n")
    assert run.end(timeout=5)[0] == 143
    assert "one " not in hosts[0].run(FALCON, "ps", cwd=hosts.disk / "work").stdout
    again = hosts[0].run(FALCON, "kill", "one", cwd=hosts.disk / "work")
    assert (again.returncode, again.stderr.startswith('falcon: kill: no such run in progress: "one"')) == (2, True)


def test_kill_ends_what_a_stopped_launcher_does_not(hosts: Hosts):
    """From another host that sees the run folder; the launcher hangs."""
    run = Run(hosts, SLEEP, flags=("--run-id", "hung")).ready()
    shared = hosts.folder / "copy"
    shared.mkdir()
    (shared / "running.json").write_text((run.work / "runs/hung/running.json").read_text())
    killed = hosts[2].run(FALCON, "kill", str(shared))
    assert killed.stdout == "node1: ended\nnode2: ended\n", killed.stderr
    assert run.end(timeout=10)[0] == 143  # once it goes on it hears that it was ended on purpose


def test_secrets_are_on_no_command_line_and_in_no_file(hosts: Hosts):
    run = Run(hosts, SLEEP).ready()
    for host in hosts.hosts[:2]:
        for pid in host.pids():
            assert CANARY not in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    assert all(f"HF_TOKEN={CANARY}" in environment_of(pid) for pid in run.ranks())
    os.kill(run.launcher(), signal.SIGTERM)
    _, out, err, _ = run.end(timeout=10)
    assert CANARY not in out + err
    for host in hosts.hosts[:2]:
        kept = [p for p in (host.disk / "work/runs").rglob("*") if p.is_file()]
        assert kept
        assert not [p for p in kept if CANARY.encode() in p.read_bytes()]


def test_the_sources_of_environment(hosts: Hosts):
    run = Run(hosts, SLEEP, flags=("--env", "MINE=1")).ready()
    for number in (0, 1):
        env = environment_of(run.rank(number)).splitlines()
        assert f"PATH={os.environ['PATH']}" in env  # ssh brings none
        assert "MINE=1" in env
        assert "GLOO_SOCKET_IFNAME=eth0" in env
        assert not [line for line in env if line.startswith("SSH_")]
    os.kill(run.launcher(), signal.SIGTERM)
    run.end(timeout=10)
