"""A launcher in progress: what it says and when, where its ranks are, and what is left of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from cluster.hosts import Host
from cluster.machine import command_line, environment_of, wait_until

END_S = 15.0
"""How long after a launcher's end something of its run may still be there: a host whose link is cut needs 10 s."""
NOTICED = re.compile(r"^noticed: (.*)")


class Said(NamedTuple):
    """A line and when it was read."""

    at: float
    text: str


class Job:
    """One falcon-launch on the first of ``hosts``."""

    def __init__(self, hosts: list[Host], words: list[str], cwd: Path, env: dict[str, str], run: Path) -> None:
        self.hosts = hosts
        self.run = run
        """Its run folder, as seen from here."""
        self.began = time.monotonic()
        self.injected_at = self.began
        self.out: list[Said] = []
        self.err: list[Said] = []
        self.process = hosts[0].enter(*words, cwd=cwd, env=env)
        self._readers = [self._follow(self.process.stdout, self.out), self._follow(self.process.stderr, self.err)]

    def wait_step(self, step: int, attempt: int = 1, timeout: float = 120) -> float:
        """Waits for a finished step of rank 0; when it was seen."""
        self._wait(lambda: self.steps(attempt) >= step or self.process.poll() is not None, timeout, f"step {step}")
        assert self.steps(attempt) >= step, f"the run ended before step {step}: {self.text()[-800:]}"
        return time.monotonic()

    def steps(self, attempt: int = 1) -> int:
        """The newest step of rank 0 in an attempt; 0: none."""
        records = self._lines(self.run / f"attempt_{attempt}/rank_0000/steps.jsonl")
        return int(json.loads(records[-1])["step"]) if records else 0

    def mark(self) -> None:
        """The fault is brought about now."""
        self.injected_at = time.monotonic()

    def pid_of(self, rank: int) -> int:
        """The process of a rank of this run."""
        wait_until(lambda: self._ranks(rank), what=f"rank {rank}")
        return self._ranks(rank)[0]

    def pids_of(self, *signs: str, host: int = 0) -> list[int]:
        """Processes on one of its hosts whose command line has these signs."""
        return self.hosts[host].find(*signs)

    def launcher(self) -> int:
        """The launcher's own process, not what entered the host for it."""
        return next(pid for pid in self.hosts[0].find("falcon-launch") if "nsenter" not in command_line(pid))

    def agents(self, host: int = 0) -> list[int]:
        """Agent and keeper of a host."""
        found = self.hosts[host].find("-m launcher.agent")
        return [
            pid for pid in found if command_line(pid).lstrip("/").split()[0].rpartition("/")[2].startswith("python")
        ]

    def signal_rank(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Marks the moment and sends a signal."""
        pid = self.pid_of(rank)
        self.mark()
        os.kill(pid, number)

    def first_line(self, pattern: str, *, after: float | None = None) -> Said | None:
        """The first line with this pattern since the injection (or ``after``)."""
        since = self.injected_at if after is None else after
        lines = sorted(line for line in (*self.out, *self.err) if line.at >= since)
        return next((line for line in lines if re.search(pattern, line.text)), None)

    def noticed(self) -> Said | None:
        """When the launcher first said that something is wrong, and what."""
        line = self.first_line(NOTICED.pattern)
        found = NOTICED.match(line.text) if line else None
        return Said(line.at, found[1]) if line and found else None

    def first_step_again(self, timeout: float = 180) -> float | None:
        """Seconds from the injection to the first step of a later attempt; None: there is none."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            files = [p for p in self.run.glob("attempt_*/rank_0000/steps.jsonl") if "attempt_1/" not in str(p)]
            if any(file.stat().st_size for file in files):
                return time.monotonic() - self.injected_at
            if self.process.poll() is not None:
                return None
            time.sleep(0.02)
        return None

    def end(self, timeout: float = 180) -> int:
        """Waits for the launcher's end; its exit code."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end within {timeout:g} s: {self.text()[-800:]}") from None
        for reader in self._readers:
            reader.join(5)
        return code

    def text(self) -> str:
        """All it said, in order."""
        return "\n".join(line.text for line in sorted((*self.out, *self.err)))

    def report(self) -> dict[str, Any]:
        """report.json of the run; empty: there is none."""
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((self.run / "report.json").read_text()))
        return {}

    def steps_lost(self) -> int | None:
        """Finished steps that had to be done again; None: no step was done."""
        attempts = self.report().get("attempts") or []
        return sum(a["steps_lost"] for a in attempts) if any(a["first_step"] for a in attempts) else None

    def _ranks(self, rank: int) -> list[int]:
        found = []
        for pid in [pid for host in self.hosts for pid in host.pids()]:
            env = f"\n{environment_of(pid)}"
            mine = f"FALCON_RANK_DIR={self.run}/" in env or f"/{self.run.name}/attempt_" in env
            if mine and f"\nRANK={rank}\n" in env and "LOCAL_RANK=" in env:
                found.append(pid)
        return sorted(found)

    def _wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come within {timeout:g} s: {self.text()[-800:]}"
            time.sleep(0.01)

    @staticmethod
    def _lines(path: Path) -> list[str]:
        try:
            return [line for line in path.read_text().splitlines() if line.endswith("}")]
        except OSError:
            return []

    @staticmethod
    def _follow(stream: IO[str] | None, lines: list[Said]) -> threading.Thread:
        def read() -> None:
            for line in stream or ():
                lines.append(Said(time.monotonic(), line.rstrip("\n")))

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread


def leave(number: int, _: object) -> None:
    """Ends this program on a signal, once: hosts are taken down on the way out, which a second must not stop."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)
