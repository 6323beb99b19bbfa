"""A Slurm job from outside: submitted, followed to its end, cancelled; from inside: started again."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from launcher.errors import LaunchError
from launcher.interrupts import stopping_signals
from launcher.slurm import Allocation, JobState

POLL_S: Final = 2.0
"""How often Slurm is asked; its controller has others to serve too."""
CLIENT_S: Final = 60.0
"""How long one of Slurm's programs may take."""
REQUEUE_S: Final = 60.0
"""How long Slurm may take to end a job that it starts again."""
SILENCE_S: Final = 120.0
"""So long the controller may be away."""
LOOKS: Final = 5
"""After so many looks a job is believed to have failed: on its way to be started again it can seem so for seconds."""


def submit(script: str) -> str:
    """Submits a job script; the job's id.

    Raises:
        LaunchError: Slurm does not take it.
    """
    return _client("sbatch", "--parsable", given=script).partition(";")[0].strip()


def requeue(within: Allocation, most: int, say: Callable[[str], None]) -> None:
    """Asks Slurm to start the job we are in again, unless that was done often enough, and waits to be ended by it."""
    if within.restarts >= most:
        say(f"job {within.job} is not started again: {most} requeues were allowed (launch.max_requeues)")
        return
    say(f"job {within.job} is to be started again by Slurm: requeue {within.restarts + 1} of {most}")
    try:
        _client("scontrol", "requeue", within.job)
    except LaunchError as fault:
        say(f"job {within.job} is not started again: {fault}")
    else:
        # A job that ends by itself in this moment can count as failed instead.
        time.sleep(REQUEUE_S)


class Follower:
    """One job and its output, until it has ended."""

    def __init__(self, job: str, say: Callable[[str], None]) -> None:
        self._job = job
        self._say = say
        self._heard_at = time.monotonic()
        self._told: JobState | None = None
        self._seen: JobState | None = None
        self._ended_looks = 0
        """How often in a row it was seen to have ended, and alike."""
        self._shown = 0
        """Bytes of its output that were passed on."""

    def until_done(self) -> int:
        """Passes on what the job writes; its exit code. A signal that asks to stop cancels it.

        Raises:
            LaunchError: Slurm tells nothing of the job for too long.
        """
        stopped_by: int | None = None
        with stopping_signals() as woken_by:
            while not self._is_over(state := self._look(), stopped_by):
                if select.select([woken_by], [], [], POLL_S)[0]:
                    for number in os.read(woken_by, 64):
                        stopped_by = self._on_signal(number) or stopped_by
        self._show(state)
        self._say(f"job {self._job}: {state.name}, exit code {state.exit_code}")
        return state.exit_code if stopped_by is None else 128 + stopped_by

    def _is_over(self, state: JobState, stopped_by: int | None) -> bool:
        self._ended_looks = self._ended_looks + 1 if state.is_final and state == self._seen else int(state.is_final)
        self._seen = state
        return self._ended_looks >= (2 if state.name == "COMPLETED" or stopped_by is not None else LOOKS)

    def _on_signal(self, number: int) -> int | None:
        if number == signal.SIGUSR1:
            _client("scancel", "--batch", "--signal=USR1", self._job)
        if number in (signal.SIGUSR1, signal.SIGTSTP):
            return None
        self._say(f"cancelling job {self._job}")
        _client("scancel", self._job)
        return number

    def _look(self) -> JobState:
        try:
            state = JobState.parse(_client("scontrol", "--oneliner", "show", "job", self._job))
            self._heard_at = time.monotonic()
        except LaunchError as fault:
            if self._told is None or time.monotonic() - self._heard_at > SILENCE_S:
                raise LaunchError(f"job {self._job}: Slurm tells nothing of it any more; {fault}") from fault
            return self._told
        if self._told is None or state.name != self._told.name:
            where = f" on {state.nodes}" if state.nodes else ""
            self._say(f"job {self._job}: {state.name}{where}{f' ({state.reason})' if state.reason else ''}")
        self._told = state
        self._show(state)
        return state

    def _show(self, state: JobState) -> None:
        try:
            with Path(state.output).open("rb") as file:
                file.seek(self._shown)
                new = file.read()
        except OSError:  # not yet, or not on a disk that is seen from here
            return
        whole, newline, _ = new.rpartition(b"\n")
        self._shown += len(whole) + len(newline)
        for line in whole.decode(errors="replace").splitlines():
            self._say(line)


def _client(*words: str, given: str | None = None, environ: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            words, input=given, capture_output=True, text=True, check=False, timeout=CLIENT_S, env=environ
        )
    except OSError as fault:
        raise LaunchError(f'cannot start "{words[0]}": {fault.strerror}; is this a host of a Slurm cluster?') from fault
    except subprocess.TimeoutExpired as fault:
        raise LaunchError(f"{words[0]}: no answer within {CLIENT_S:g} s") from fault
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise LaunchError(f"{words[0]}: exit code {done.returncode}: {' '.join(said)}")
    return done.stdout
