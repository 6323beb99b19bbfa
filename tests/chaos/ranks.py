"""Ranks that die, break, hang, lag or fail over and over: rows 1-4, 8, 31, 33."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress

from cluster.programs import HOG

from chaos.bed import Bed
from chaos.expect import again, merge, stopped, unharmed
from chaos.job import Job
from chaos.table import Fault, Found

AT = 25
"""The step at which most faults come: between two checkpoints."""
HANG_S = 6
ALWAYS_FAILS = """
import os, sys, time
time.sleep(0.3)
sys.exit("the same fault again" if os.environ["RANK"] == "1" else 0)
"""


def killed(bed: Bed) -> Found:
    job = bed.train("--max-restarts", "2")
    job.wait_step(AT)
    job.signal_rank(1)
    return again(bed, job, r"rank 1 \(local_rank \d, host \w+\) failed first: SIGKILL")


def out_of_memory(bed: Bed) -> Found:
    limit = 300 << 20
    bed.last.limit_memory(limit)
    try:
        job = bed.program(HOG, "--max-restarts", "3")
        found = stopped(bed, job, r"rank 1 .* failed first: out of memory, SIGKILL", (137,), within=60)
    finally:
        bed.last.free_memory()
    tried = ["it was started again unchanged"] if (job.run / "attempt_2").exists() else []
    return merge(found, tried)


def segfault(bed: Bed) -> Found:
    job = bed.train("--max-restarts", "2", *bed.inside(1, AT, "segfault"))
    injected(bed, job, 1)
    found = again(bed, job, r"rank 1 .* failed first: SIGSEGV")
    stacked = any("string_at" in line.text for line in job.err)
    return merge(found, [] if stacked else ["no Python stack of the fault"])


def exception(bed: Bed) -> Found:
    job = bed.train("--max-restarts", "2", *bed.inside(1, AT, "raise"))
    injected(bed, job, 1)
    found = again(bed, job, r"rank 1 .* failed first: exit code 1", within=5.0)
    named = any("ChaosError" in line.text for line in job.err)
    return merge(found, [] if named else ["the exception is not shown"])


def straggler(bed: Bed) -> Found:
    job = bed.train()
    job.wait_step(3)
    job.mark()
    with slowed(job.pid_of(1)):
        job.wait_step(58, timeout=240)
    return unharmed(bed, job, r"rank 1 \(host \w+\) .*(slow|behind|longer)")


def hung(bed: Bed) -> Found:
    job = bed.train("--max-restarts", "2", "--set", f"launch.hang_s={HANG_S}")
    job.wait_step(AT)
    job.signal_rank(1, signal.SIGSTOP)
    found = again(
        bed, job, r"no rank has finished a step .*rank 1 .* is stopped", within=HANG_S + 9, slack_s=HANG_S + 9
    )
    return merge(found, _stacks(job))


def holds_the_interpreter(bed: Bed) -> Found:
    job = bed.train(
        *("--max-restarts", "2", "--set", f"launch.hang_s={HANG_S}"), *bed.inside(1, AT, "hold the interpreter")
    )
    injected(bed, job, 1)
    found = again(bed, job, r"no rank has finished a step .*rank 1 ", within=HANG_S + 9, slack_s=HANG_S + 9)
    return merge(found, _stacks(job))


def crash_loop(bed: Bed) -> Found:
    job = bed.program(ALWAYS_FAILS, "--max-restarts", "10")
    job.mark()
    found = stopped(bed, job, "not started again: 3 restarts in a row brought no new checkpoint", (1,), within=60)
    attempts = len(job.report().get("attempts") or [])
    return merge(found, [] if attempts == 4 else [f"{attempts} attempts"])


def injected(bed: Bed, job: Job, rank: int, timeout: float = 120) -> None:
    """Waits until a fault from inside a rank has come, and takes its time."""
    file = job.run / f"attempt_1/rank_{rank:04d}/injected"
    deadline = time.monotonic() + timeout
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, job.text()[-800:]
        assert job.process.poll() is None, job.text()[-800:]
        time.sleep(0.01)
    job.injected_at = float(file.read_text())


class slowed:  # noqa: N801  # used as a context manager
    """A process gets a fifth of its time only, in portions shorter than a step, so that every step is slow."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.is_set():
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGSTOP)
                time.sleep(0.016)
                os.kill(self._pid, signal.SIGCONT)
            time.sleep(0.004)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGCONT)


def _stacks(job: Job) -> list[str]:
    kept = list(job.run.glob("attempt_1/rank_*/stacks.txt"))
    return [] if any(path.stat().st_size for path in kept) else ["no stacks were kept"]


FAULTS = (
    Fault(number=1, name="rank killed (SIGKILL)", local=killed, hosts=killed, quick=True),
    Fault(number=2, name="out of memory", local=out_of_memory, hosts=out_of_memory, quick=True),
    Fault(number=3, name="segmentation fault in a rank", local=segfault, hosts=segfault),
    Fault(number=4, name="Python exception on one rank", local=exception, hosts=exception, quick=True),
    Fault(number=8, name="straggler: a rank gets a fifth of its cpu", local=straggler, hosts=straggler),
    Fault(
        number=31,
        name="hang: a rank holds the interpreter's lock / is stopped",
        local=holds_the_interpreter,
        hosts=hung,
    ),
    Fault(number=33, name="crash loop", local=crash_loop, hosts=crash_loop, quick=True),
)
