"""``python -m chaos.soak``: a run over two hosts with a random fault every few minutes, beside one without any.

Both take the same steps at the same time on the same machine; in the end they must have the very same weights. The one
without must have had no fault noticed either, and the other one none but those that were brought about: four ranks on
two cpus are slow, and nothing is wrong with them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cluster.hosts import Hosts

from chaos.bed import Bed, write_inputs
from chaos.job import Job, leave
from chaos.soaked import Soaked

HANG_S = 15
SPARED = 50
"""No fault comes in so many last steps: one at the very end would be followed by another attempt or not, by chance."""
TRIED = 50, 450
"""Steps of both runs at once between which a step is timed."""
LONGER = 1.05
"""So much longer than was asked for, lest a trial that was slow makes it shorter."""


def kill_rank(job: Job, bed: Bed, chance: random.Random) -> str:
    rank = chance.randrange(2)
    os.kill(job.pid_of(rank), signal.SIGKILL)
    return f"rank {rank} killed"


def stop_rank(job: Job, bed: Bed, chance: random.Random) -> str:
    rank = chance.randrange(2)
    os.kill(job.pid_of(rank), signal.SIGSTOP)
    return f"rank {rank} stopped"


def kill_agent(job: Job, bed: Bed, chance: random.Random) -> str:
    host = chance.randrange(2)
    os.kill(chance.choice(job.agents(host)), signal.SIGKILL)
    return f"agent or keeper of node{host + 1} killed"


def kill_ssh(job: Job, bed: Bed, chance: random.Random) -> str:
    (client,) = [pid for pid in job.hosts[0].find("ssh", "launcher.agent") if pid not in job.agents(0)]
    os.kill(client, signal.SIGKILL)
    return "ssh client killed"


FAULTS: tuple[Callable[[Job, Bed, random.Random], str], ...] = (kill_rank, kill_rank, stop_rank, kill_agent, kill_ssh)
"""Each of them ends the attempt and leaves a rank that has the whole state."""


def main() -> int:
    """Exit code 1 where the run did not end well, something was left, or the weights differ."""
    parser = argparse.ArgumentParser(prog="python -m chaos.soak")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--every", type=float, default=180, metavar="SECONDS", help="between faults")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, leave)
    print(f"--seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        with Hosts(4, Path(folder) / "c") as hosts:
            write_inputs(hosts.folder / "shared/inputs")
            beds = Bed("hosts", hosts), Bed("hosts", hosts, first=3)
            return soak(*beds, args.minutes * 60, args.every, random.Random(args.seed))


def soak(bed: Bed, quiet: Bed, seconds: float, every: float, chance: random.Random) -> int:
    """Measures a step, runs both, disturbs one, compares."""
    quiet.work = bed.work = bed.shared / "soak"
    bed.work.mkdir()
    step_s = step_seconds(bed, quiet)
    steps, began = int(LONGER * seconds / step_s), time.monotonic()
    sets = [f"loop.max_steps={steps}", f"checkpoint.every={max(20, steps // 40)}", "checkpoint.keep_last=3"]
    flags = [word for text in (*sets, "report.log_every=0", f"launch.hang_s={HANG_S}") for word in ("--set", text)]
    print(f"{steps} steps, of which one takes {step_s:.3f} s", flush=True)
    calm, job = quiet.train(*flags, run="calm"), bed.train(*flags, "--max-restarts", "1000", run="disturbed")
    count = disturb(job, bed, every, steps - SPARED, chance)
    code, calm_code = job.end(seconds * 4), calm.end(seconds * 4)
    print("\n".join(line.text for line in job.out[-30:]), flush=True)
    attempts, weights, alarm = job.report().get("attempts") or [], bed.weights(job.run, steps), calm.noticed()
    soaked = Soaked(
        asked_s=seconds,
        took_s=time.monotonic() - began,
        faults=count,
        attempts=len(attempts),
        steps_lost=sum(a["steps_lost"] for a in attempts),
        exit_codes=(code, calm_code),
        left=bed.count_orphans() + quiet.count_orphans(),
        losses=(final_loss(job, steps), final_loss(calm, steps)),
        same_weights=bool(weights) and weights == quiet.weights(calm.run, steps),
        alarm=alarm.text if alarm else "",
        load=os.getloadavg()[2],
        goodput=job.report().get("goodput"),
    )
    print(soaked.told(), flush=True)
    return 1 if soaked.wrong() else 0


def step_seconds(*beds: Bed) -> float:
    """What a step takes while each bed trains."""
    first, last = TRIED
    flags = [f"loop.max_steps={last}", "checkpoint.every=100", "checkpoint.keep_last=3", "report.log_every=0"]
    words = [word for text in flags for word in ("--set", text)]
    jobs = [bed.train(*words, run=f"trial{number}") for number, bed in enumerate(beds)]
    began = max(job.wait_step(first, timeout=600) for job in jobs)
    found = (min(job.wait_step(last, timeout=600) for job in jobs) - began) / (last - first)
    for job in jobs:
        assert job.end() == 0, job.text()
    return found


def disturb(job: Job, bed: Bed, every: float, until: int, chance: random.Random) -> int:
    """A fault whenever the time has come and ranks train, until this step; how many were brought about."""
    count, hit = 0, 0
    due = time.monotonic() + every
    while job.process.poll() is None:
        time.sleep(0.2)
        attempt = newest(job)
        # The next one waits until the last one has been noticed: each fault is to have an attempt of its own.
        if time.monotonic() < due or attempt == hit or not 0 < job.steps(attempt) < until:
            continue
        kind = chance.choice(FAULTS)
        try:
            told = kind(job, bed, chance)
        except (IndexError, ValueError, ProcessLookupError, AssertionError) as fault:  # what it was to hit is not there
            print(f"{time.strftime('%H:%M:%S')} not brought about: {kind.__name__}: {fault!r}", flush=True)
            continue
        count, hit = count + 1, attempt
        print(f"{time.strftime('%H:%M:%S')} fault {count}: {told}, attempt {attempt}", flush=True)
        due = time.monotonic() + every * chance.uniform(0.8, 1.2)
    return count


def newest(job: Job) -> int:
    """Number of the attempt in progress."""
    return max((int(path.name.removeprefix("attempt_")) for path in job.run.glob("attempt_*")), default=0)


def final_loss(job: Job, steps: int) -> float:
    """The last step's, wherever it was done."""
    for file in sorted(job.run.glob("attempt_*/rank_0000/steps.jsonl"), reverse=True):
        for line in reversed(file.read_text().splitlines()):
            record = json.loads(line)
            if record["step"] == steps:
                return float(record["loss"])
    return float("nan")


if __name__ == "__main__":
    sys.exit(main())
