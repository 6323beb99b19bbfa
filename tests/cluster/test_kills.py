"""Kills at random moments of random parts of a run: nothing is left, the exit code is right, the dead one is named."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import BIN, write_inputs

from cluster.hosts import Host, Hosts
from cluster.machine import command_line, environment_of, parent_of, wait_until
from cluster.programs import SLEEP

NODES = 2
RANKS_A_NODE = 2
SIGNS = ("program.py", "launcher.agent", "-m falcon_dist", "falcon_dist.store", "sleep 1000")
SLEEPING_S, TRAINING_S = 2.0, 25.0
"""Kills come within this after a start: while it starts, runs, or trains and saves."""


def program_of(pid: int) -> str:
    """What a process runs: a login shell's own children are named like the command it is to start."""
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""


def of_host(host: Host) -> list[tuple[str, str, int]]:
    """Parts of the run on a host: what it is, the words by which it has to be named, its number."""
    agents = [pid for pid in host.find("-m launcher.agent") if program_of(pid).startswith("python")]
    found = []
    for pid in agents:
        if parent_of(pid) not in agents:
            found.append(("keeper", f"{host.name}: ", pid))
        elif parent_of(parent_of(pid)) not in agents:
            found.append(("agent", f"{host.name}: ", pid))
    for pid in host.find("program.py") + host.find("-m falcon_dist train"):
        env = environment_of(pid).splitlines()
        rank = next((line.removeprefix("RANK=") for line in env if line.startswith("RANK=")), None)
        if rank is not None and parent_of(pid) in agents:
            local = int(rank) % RANKS_A_NODE
            named = f"rank {rank} (local_rank {local}, host {host.name}) failed first: SIGKILL"
            found.append(("rank", named, pid))
    return found


def parts(hosts: Hosts) -> list[tuple[str, str, int]]:
    found = [part for host in hosts.hosts[:NODES] for part in of_host(host)]
    for pid in hosts[0].find("launcher.agent"):
        if program_of(pid) == "ssh":
            found.append(("ssh", "node2: ", pid))
    for pid in hosts[0].find("falcon-launch"):
        if program_of(pid).startswith("python") and not program_of(parent_of(pid)).startswith("python"):
            found.append(("launcher", "", pid))
    return found


def left(hosts: Hosts) -> list[str]:
    return [command_line(pid) for host in hosts.hosts[:NODES] for sign in SIGNS for pid in host.find(sign)]


def kill_any(hosts: Hosts, chance: random.Random, run: subprocess.Popen[str]) -> tuple[str, str, str]:
    """Kills any part of the run, each kind as often as the others; what it was, and how it has to be named."""
    while run.poll() is None:
        by_kind: dict[str, list[tuple[str, int]]] = {}
        for kind, name, pid in parts(hosts):
            by_kind.setdefault(kind, []).append((name, pid))
        if not by_kind:
            continue
        kind = chance.choice(sorted(by_kind))
        name, pid = chance.choice(by_kind[kind])
        told = f"{kind} {pid} of parent {parent_of(pid)}: {command_line(pid)}"
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # a process of the start that was replaced meanwhile
            continue
        return kind, name, told
    raise AssertionError(f"ended by itself with {run.returncode} before anything was killed: {run.communicate()[1]}")


def kill_one(hosts: Hosts, chance: random.Random, program: list[str], within_s: float) -> tuple[str, float]:
    """One run, one kill; what was killed and how long all took to end."""
    named = ["--hosts", "node[1-2]", "--nproc-per-node", str(RANKS_A_NODE)]
    words = [str(BIN / "falcon-launch"), *named, *program]
    process = hosts[0].enter(*words, cwd=hosts.disk / "work")
    time.sleep(chance.uniform(0.0, within_s))
    kind, name, told = kill_any(hosts, chance, process)
    begun = time.monotonic()
    try:
        _, err = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"goes on without {told}") from None
    wait_until(lambda: not left(hosts), 15, f"the end of {left(hosts)} after {kind}")
    seconds = time.monotonic() - begun
    assert [place for host in hosts.hosts[:NODES] for place in host.listening()] == []
    code = {"rank": 137, "launcher": -signal.SIGKILL}.get(kind, 1)
    assert process.returncode == code, (told, process.returncode, err)
    assert err.startswith(name) or f": {name}" in err.splitlines()[0], (kind, name, err)
    assert seconds < (10 if kind == "rank" else 15), (kind, seconds)
    return kind, seconds


def kill_many(hosts: Hosts, count: int, program: Callable[[random.Random], list[str]], within_s: float) -> str:
    """So many runs, each with one kill; what was killed, and how soon nothing was left. KILL_SEED repeats a series."""
    seed = int(os.environ.get("KILL_SEED", random.randrange(1 << 30)))
    chance = random.Random(seed)
    longest: dict[str, float] = {}
    counts: dict[str, int] = {}
    for number in range(count):
        try:
            kind, seconds = kill_one(hosts, chance, program(chance), within_s)
        except AssertionError as fault:
            raise AssertionError(f"kill {number} of KILL_SEED={seed}: {fault}") from fault
        counts[kind] = counts.get(kind, 0) + 1
        longest[kind] = max(longest.get(kind, 0.0), seconds)
        if os.environ.get("KILL_LEDGER"):
            Path(os.environ["KILL_LEDGER"]).write_text(f"{number + 1} of {count}, seed {seed}: {counts}\n")
    return f"killed {counts}; all ended within { ({k: round(v, 1) for k, v in longest.items()}) } s, no port held"


@pytest.fixture
def work(hosts: Hosts) -> Path:
    """The folder that runs start from, on each host's own disk."""
    for host in hosts.hosts[:NODES]:
        (host.disk / "work").mkdir(exist_ok=True)
        (host.disk / "work/program.py").write_text(SLEEP)
    return hosts[0].disk / "work"


@pytest.mark.parametrize("count", [12, pytest.param(950, marks=pytest.mark.slow)])
@pytest.mark.timeout(7200)
def test_random_kills(hosts: Hosts, work: Path, count: int, capsys: pytest.CaptureFixture[str]):
    def program(chance: random.Random) -> list[str]:
        return ["--", "program.py", *chance.choice([(), ("deaf",), ("apart",)])]

    told = kill_many(hosts, count, program, SLEEPING_S)
    with capsys.disabled():
        print(f"\n{told}")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_random_kills_while_training(hosts: Hosts, work: Path, capsys: pytest.CaptureFixture[str]):
    recipe = write_inputs(work)
    recipe.write_text(recipe.read_text().replace(str(work), str(hosts.disk / "work")).replace("= 8\n", "= 4000\n", 1))
    flags = ["--recipe", "recipe.toml", "--backend", "gloo", "--use-logical-cores", "--set", "evaluate.base=false"]
    told = kill_many(hosts, int(os.environ.get("KILLS", "50")), lambda _: flags, TRAINING_S)
    with capsys.disabled():
        print(f"\nwhile training: {told}")
