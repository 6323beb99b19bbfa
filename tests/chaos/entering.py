"""Ports, signals and time limits: rows 15, 16, 18."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace

from chaos import saving
from chaos.bed import Bed
from chaos.expect import merge, stopped, unharmed
from chaos.table import Fault, Found
from falcon_dist.contract import EXIT_STOPPED

AT = 25
USUAL_PORT = 29500
HOLD_PORT = """
import os, socket, time
held = socket.create_server(("", {port}))
print(os.getpid(), open("/proc/self/stat").read().rpartition(")")[2].split()[19], flush=True)
time.sleep(600)
"""


def port_in_use(bed: Bed) -> Found:
    """The port everybody takes is held; a run starts, and one is resumed whose mark names a process that is alive and
    not its launcher: the number and the start time are those of a boot before.
    """
    mark = saving.abandoned(bed, AT).run / "running.json"
    told = json.loads(mark.read_text())
    holder = bed.main.enter("python3", "-c", HOLD_PORT.format(port=USUAL_PORT))
    try:
        assert holder.stdout is not None
        pid, started = map(int, holder.stdout.readline().split())
        told["launcher"] |= {"boot_id": "gone", "pid": pid, "started": started}
        mark.write_text(json.dumps(told))
        first, second = bed.resume(run="r"), bed.train(run="s")
        for job in (first, second):
            job.end()
        wrong = [] if holder.poll() is None else ["the process that the mark names was ended"]
    finally:
        holder.kill()
        holder.wait()
    wrong += [] if first.first_line("resuming from .*step-") else ["it was not resumed"]
    return merge(unharmed(bed, first), [*unharmed(bed, second).wrong, *wrong])


def interrupted(bed: Bed) -> Found:
    """Ctrl-C once on one host, SIGTERM twice on two."""
    number = signal.SIGINT if bed.mode == "local" else signal.SIGTERM
    job = bed.train("--max-restarts", "3")
    job.wait_step(AT)
    pid = job.launcher()
    job.mark()
    os.kill(pid, number)
    if bed.mode == "hosts":
        time.sleep(0.05)
        os.kill(pid, number)
    code = job.end(20)
    down_s = time.monotonic() - job.injected_at
    found = stopped(bed, job, f"interrupted by {number.name}", (128 + number,), within=10)
    first = job.first_line(f"^{number.name}: stopping")
    late = [] if down_s < 10 else [f"down after {down_s:.0f} s only"]
    wrong = [*late, *([] if first and code == 128 + number else ["the signal was not told"])]
    return merge(replace(found, detected_s=first.at - job.injected_at if first else None), wrong)


def time_is_up(bed: Bed) -> Found:
    """SIGUSR1, as Slurm sends it some minutes before it takes a job's hosts away; then the run is resumed."""
    job = bed.train()
    job.wait_step(AT)
    pid = job.launcher()
    job.mark()
    os.kill(pid, signal.SIGUSR1)
    code = job.end(60)
    told, reached = job.first_line("SIGUSR1|make way"), job.steps()
    found = saving.resumed(bed, f"resuming from .*step-{reached:06d}", lost=0, reached=reached)
    wrong = [] if code == EXIT_STOPPED else [f"exit code {code}, not {EXIT_STOPPED}: start me again"]
    found = merge(found, [*wrong, *([] if told else ["nothing said of it"])])
    detected_s, cause = (told.at - job.injected_at, told.text) if told else (None, "")
    return replace(found, detected_s=detected_s, cause=cause, exit_code=code)


FAULTS = (
    Fault(number=15, name="port 29500 held, stale mark, two runs at once", local=port_in_use, hosts=port_in_use),
    Fault(number=16, name="Ctrl-C / SIGTERM twice", local=interrupted, hosts=interrupted, quick=True),
    Fault(number=18, name="time limit: SIGUSR1 before the end", local=time_is_up, hosts=time_is_up),
)
