"""Kills at random moments of random parts of a run: nothing is left, the exit code is right, the dead one is named."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from launching import write_inputs
from saves.ledger import Ledger

from cluster.hosts import Hosts
from cluster.killer import ALIVE, BEFORE, KINDS, NODES, RANKS_A_NODE, STEPPED, Kill, Killer, Ranks
from cluster.programs import SLEEP


def kill_many(hosts: Hosts, idle: set[int], ranks: Ranks, count: int, title: str) -> str:
    """So many runs, each with one kill; the ledger of what was killed when. KILL_SEED repeats a series."""
    seed = int(os.environ.get("KILL_SEED", random.randrange(1 << 30)))
    killer = Killer(hosts, idle, ranks, random.Random(seed))
    ledger, kills = Ledger(f"{title}, seed {seed}"), list[Kill]()
    for number in range(count):
        try:
            kills.append(killer.kill_one(early=(number + 1) % ranks.early == 0))
        except AssertionError as fault:
            raise AssertionError(f"kill {number} of KILL_SEED={seed}: {fault}") from fault
        kind, phase, seconds = kills[-1]
        ledger.count(kind, phase)
        write_ledger(f"{number + 1} of {count} {title}: {kind}, {phase}, over within {seconds:.1f} s")
    ledger.fact("all over, and no port held, within", f"{max(kill.seconds for kill in kills):.1f} s")
    write_ledger(str(ledger))
    check_spread(kills, ranks)
    return str(ledger)


def write_ledger(line: str) -> None:
    """Adds to the file that KILL_LEDGER names."""
    if name := os.environ.get("KILL_LEDGER"):
        with Path(name).open("a") as file:
            file.write(f"{line}\n")


def check_spread(kills: list[Kill], ranks: Ranks) -> None:
    """Enough kills met what there is to be left behind, and every kind of process is among them."""
    met = sum(kill.phase == ranks.ready for kill in kills)
    assert met >= ranks.least * len(kills), f"{ranks.ready}: {met} of {len(kills)}"
    alive = [kill.kind for kill in kills if kill.phase != BEFORE]
    for kind in KINDS:
        assert alive.count(kind) >= len(alive) // 10, f"{kind}: {alive.count(kind)} of {len(alive)} that met live ranks"


@pytest.fixture(scope="module")
def idle(hosts: Hosts) -> Iterator[set[int]]:
    """Processes of hosts on which nothing runs: the first one, what waits for it, and the sshd that listens."""
    with ExitStack() as without:
        # What a login of this machine does can take longer than all else of a short run, and is nobody's orphan.
        for host in hosts if (own := Path.home() / ".bashrc").exists() else ():
            without.enter_context(host.mounted("--bind", "/dev/null", str(own)))
        yield {pid for host in hosts for pid in host.pids()}


@pytest.fixture
def work(hosts: Hosts, idle: set[int]) -> Path:
    """The folder that runs start from, on each host's own disk."""
    for host in hosts.hosts[:NODES]:
        (host.disk / "work").mkdir(exist_ok=True)
        (host.disk / "work/program.py").write_text(SLEEP)
    return hosts[0].disk / "work"


SLEEPING = Ranks(
    # One deaf to SIGTERM takes three seconds to end, so it is the rarer kind.
    words=lambda chance: ["--", "program.py", *chance.choice([(), ("apart",), ("apart",), ("deaf",)])],
    is_ready=lambda work: (work / "out").read_text().count("] ready\n") == NODES * RANKS_A_NODE,
    ready=ALIVE,
    least=0.5,
    early=4,
    starting_s=2.0,
    going_s=1.5,
)
TRAINING = Ranks(
    words=lambda _: [
        *("--recipe", "recipe.toml", "--backend", "gloo", "--use-logical-cores"),
        *("--set", "evaluate.base=false"),
    ],
    is_ready=lambda work: any("\n" in file.read_text() for file in work.glob("runs/*/attempt_1/rank_0000/steps.jsonl")),
    ready=STEPPED,
    least=0.7,
    early=5,
    starting_s=25.0,
    going_s=3.0,
)


@pytest.mark.parametrize("count", [12, pytest.param(950, marks=pytest.mark.slow)])
@pytest.mark.timeout(7200)
def test_random_kills(hosts: Hosts, idle: set[int], work: Path, count: int, capsys: pytest.CaptureFixture[str]):
    told = kill_many(hosts, idle, SLEEPING, int(os.environ.get("KILLS", count)), "kills of runs with plain ranks")
    with capsys.disabled():
        print(f"\n{told}")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_random_kills_while_training(hosts: Hosts, idle: set[int], work: Path, capsys: pytest.CaptureFixture[str]):
    recipe = write_inputs(work)
    recipe.write_text(recipe.read_text().replace(str(work), str(hosts.disk / "work")).replace("= 8\n", "= 4000\n", 1))
    told = kill_many(hosts, idle, TRAINING, int(os.environ.get("KILLS", "50")), "kills of training runs")
    with capsys.disabled():
        print(f"\n{told}")
