"""Who runs what: files in the run folder by which ``falcon ps`` and ``falcon kill`` find processes that are ours.

A process is named by its number, its start time and the boot it belongs to, so that a number used again by somebody
else is never taken for ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from launcher.plan import NodePlan

ENDED: Final = "ended"
END_SIGNAL: Final = signal.SIGUSR2
"""Ends an agent for good. SIGTERM also comes where its keeper died or its host goes down: no reason not to go on."""
END_S: Final = 8.0
"""How long a process may take to end before it is killed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process, and no other with its number."""

    hostname: str
    boot_id: str
    pid: int
    started: int
    """In clock ticks since boot."""

    @classmethod
    def this(cls) -> Process:
        """The calling process."""
        pid = os.getpid()
        return cls(hostname=socket.gethostname(), boot_id=_boot_id(), pid=pid, started=_started(pid) or 0)

    @property
    def is_of_this_host(self) -> bool:
        """It belongs to this host, if perhaps to an earlier boot."""
        return self.hostname == socket.gethostname()

    @property
    def is_here(self) -> bool:
        """It belongs to this host and this boot."""
        return self.is_of_this_host and self.boot_id == _boot_id()

    @property
    def is_alive(self) -> bool:
        """It is on this host and has not ended."""
        return self.is_here and _started(self.pid) == self.started

    def end(self, number: int = signal.SIGTERM, patience_s: float = END_S) -> bool:
        """Signals it and waits; True: it is gone."""
        deadline = time.monotonic() + patience_s
        with contextlib.suppress(ProcessLookupError):
            if self.is_alive:
                os.kill(self.pid, number)
        while self.is_alive and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.is_alive


def sign(plan: NodePlan) -> None:
    """Writes down the calling agent, for whoever wants to end its part of the run."""
    path = Path(plan.roster)
    # By itself: folders that are made on the way to another one are open to all.
    path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write(path, asdict(Process.this()))


def end(file: str) -> str:
    """Ends the agent that signed ``file`` and thereby its ranks; tells in a few words what happened."""
    try:
        agent = Process(**json.loads(Path(file).read_text()))
    except (OSError, ValueError, TypeError):
        return "nothing of this run is known here"
    if not agent.is_of_this_host:
        return f"could not be ended from here: it is on {agent.hostname}; run falcon kill there"
    if not agent.is_here:
        return "the host was started again since then; nothing of this run is left"
    if not agent.is_alive:
        return "already ended"
    return ENDED if agent.end(END_SIGNAL) or agent.end(signal.SIGKILL) else "could not be ended"


def write(path: Path, values: dict[str, Any]) -> None:
    """A small JSON file, whole or not at all, for its owner only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values) + "\n")
    partial.chmod(0o600)
    partial.rename(path)


def _started(pid: int) -> int | None:
    """Start time of a living process; None: there is none, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
