"""Kills one part of a run that is at a known point, and sees that all the rest ends in time and as it should."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from launching import BIN

from cluster.hosts import Host, Hosts
from cluster.machine import command_line, environment_of, parent_of, wait_until

NODES = 2
RANKS_A_NODE = 2
KINDS = ("agent", "keeper", "launcher", "rank", "ssh")
BEFORE, ALIVE, STEPPED = "before ranks", "ranks alive", "after a step"
"""What a kill can meet."""
READY_S = 240.0
"""A run that is not ready by then never will be."""


class Ranks(NamedTuple):
    """What is killed: most runs some time after they are ready, some while they start."""

    words: Callable[[random.Random], list[str]]
    is_ready: Callable[[Path], bool]
    """Asked about the folder that runs start from."""
    ready: str
    """What a kill meets from then on."""
    least: float
    """The share of kills that has to meet that."""
    early: int
    """One run of so many is not waited for."""
    starting_s: float
    """It is killed within this after its start."""
    going_s: float
    """The others are killed within this after they are ready."""


class Kill(NamedTuple):
    """What was killed, what it met, and how long all took to end."""

    kind: str
    phase: str
    seconds: float


class Part(NamedTuple):
    """A process of a run: what it is, and the words by which its death has to be named."""

    kind: str
    named: str
    pid: int


def program_of(pid: int) -> str:
    """What a process runs: a login shell's own children are named like the command it is to start."""
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""


def of_host(host: Host) -> list[Part]:
    """Parts of the run on a host."""
    agents = [pid for pid in host.find("-m launcher.agent") if program_of(pid).startswith("python")]
    found = []
    for pid in agents:
        if parent_of(pid) not in agents:
            found.append(Part("keeper", f"{host.name}: ", pid))
        elif parent_of(parent_of(pid)) not in agents:
            found.append(Part("agent", f"{host.name}: ", pid))
    for pid in host.find("program.py") + host.find("-m falcon_dist train"):
        env = environment_of(pid).splitlines()
        rank = next((line.removeprefix("RANK=") for line in env if line.startswith("RANK=")), None)
        if rank is not None and parent_of(pid) in agents:
            local = int(rank) % RANKS_A_NODE
            named = f"rank {rank} (local_rank {local}, host {host.name}) failed first: SIGKILL"
            found.append(Part("rank", named, pid))
    return found


def parts(hosts: Hosts) -> list[Part]:
    found = [part for host in hosts.hosts[:NODES] for part in of_host(host)]
    for pid in hosts[0].find("launcher.agent"):
        if program_of(pid) == "ssh":
            found.append(Part("ssh", "node2: ", pid))
    for pid in hosts[0].find("falcon-launch"):
        if program_of(pid).startswith("python") and not program_of(parent_of(pid)).startswith("python"):
            found.append(Part("launcher", "", pid))
    return found


def started_at(pid: int) -> str:
    """By it a process is told from a later one of the same number; empty: it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def family(pid: int) -> Iterator[tuple[int, str]]:
    """A process and all that it has started, each with its start time."""
    yield pid, started_at(pid)
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:  # this thread has ended
            continue
        for child in children:
            yield from family(int(child))


def living(followed: list[tuple[int, str]]) -> list[int]:
    """Those of them that have not ended."""
    return [pid for pid, start in followed if started_at(pid) == start]


class Killer:
    """Starts runs and kills one part of each."""

    def __init__(self, hosts: Hosts, idle: set[int], ranks: Ranks, chance: random.Random) -> None:
        """``idle``: processes of the hosts when nothing runs."""
        self._hosts = hosts
        self._idle = idle
        self._ranks = ranks
        self._chance = chance
        self._work = hosts[0].disk / "work"
        self._deck: list[str] = []

    def kill_one(self, *, early: bool) -> Kill:
        """One run, one kill."""
        process = self._start()
        if early:
            time.sleep(self._chance.uniform(0.0, self._ranks.starting_s))
        else:
            self._wait_ready(process)
            time.sleep(self._chance.uniform(0.0, self._ranks.going_s))
        followed = self._follow(process)
        part, phase, told = self._kill_any(process)
        begun = time.monotonic()
        try:
            code = process.wait(20)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"goes on without {told}") from None
        self._wait_gone(followed, part.kind)
        seconds = time.monotonic() - begun
        assert [place for host in self._hosts for place in host.listening()] == []
        err = (self._work / "err").read_text()
        due = {"rank": 137, "launcher": -signal.SIGKILL}.get(part.kind, 1)
        assert code == due, (told, code, err)
        assert err.startswith(part.named) or f": {part.named}" in err.splitlines()[0], (part, err)
        assert seconds < (10 if part.kind == "rank" else 15), (part.kind, seconds)
        return Kill(part.kind, phase, seconds)

    def _start(self) -> subprocess.Popen[str]:
        for host in self._hosts.hosts[:NODES]:
            shutil.rmtree(host.disk / "work/runs", ignore_errors=True)
        named = ["--hosts", "node[1-2]", "--nproc-per-node", str(RANKS_A_NODE)]
        words = [str(BIN / "falcon-launch"), *named, *self._ranks.words(self._chance)]
        with (self._work / "out").open("w") as out, (self._work / "err").open("w") as err:
            return self._hosts[0].enter(*words, cwd=self._hosts.disk / "work", stdout=out, stderr=err)

    def _wait_ready(self, run: subprocess.Popen[str]) -> None:
        wait_until(lambda: self._ranks.is_ready(self._work) or run.poll() is not None, READY_S, "a run's readiness")
        self._check_going(run)

    def _kill_any(self, run: subprocess.Popen[str]) -> tuple[Part, str, str]:
        """Kills any part of the run, each kind as often as the others; what it was, what it met, and all of it."""
        while True:
            self._check_going(run)
            found = parts(self._hosts)
            if not found:
                continue
            part, phase = self._draw(found), self._phase(found)
            told = f"{part.kind} {part.pid} of parent {parent_of(part.pid)}: {command_line(part.pid)}"
            try:
                os.kill(part.pid, signal.SIGKILL)
            except ProcessLookupError:  # a process of the start that was replaced meanwhile
                continue
            if phase != BEFORE and part.kind in self._deck:
                self._deck.remove(part.kind)
            return part, phase, told

    def _draw(self, found: list[Part]) -> Part:
        """Where ranks live, kinds come in turns of a random order: chance would leave one out of a few dozen."""
        there = {part.kind for part in found}
        if "rank" in there and not self._deck:
            self._deck = self._chance.sample(KINDS, len(KINDS))
        due = [kind for kind in self._deck if kind in there] if "rank" in there else []
        kind = due[0] if due else self._chance.choice(sorted(there))
        return self._chance.choice([part for part in found if part.kind == kind])

    def _phase(self, found: list[Part]) -> str:
        if all(part.kind != "rank" for part in found):
            return BEFORE
        return self._ranks.ready if self._ranks.is_ready(self._work) else ALIVE

    def _check_going(self, run: subprocess.Popen[str]) -> None:
        said = (self._work / "err").read_text()
        assert run.poll() is None, f"ended by itself with {run.returncode} before anything was killed: {said}"

    def _follow(self, run: subprocess.Popen[str]) -> list[tuple[int, str]]:
        """All processes of a run: what is on the hosts, and what the launcher has started, wherever it is."""
        everything = {*family(run.pid), *((pid, started_at(pid)) for pid in self._busy())}
        return [(pid, start) for pid, start in everything if start]

    def _busy(self) -> dict[int, str]:
        """Whatever is on a host that is not there when nothing runs."""
        return {pid: host.name for host in self._hosts for pid in host.pids() if pid not in self._idle}

    def _wait_gone(self, followed: list[tuple[int, str]], kind: str) -> None:
        try:
            # Those known are looked at first: it is cheap, and a machine that is kept busy ends nothing sooner.
            wait_until(lambda: not living(followed) and not self._busy(), 15)
        except AssertionError:
            left = dict.fromkeys(living(followed), "elsewhere") | self._busy()
            told = [f"{place}: {pid} {command_line(pid)}" for pid, place in left.items()]
            raise AssertionError(f"left after {kind}: {told}") from None
