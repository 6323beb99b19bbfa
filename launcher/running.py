"""Runs in progress, as their folders tell: who runs them, and how they are ended from outside."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from launcher import discover, transport
from launcher.errors import UserError
from launcher.folder import RUNNING_FILE
from launcher.hostfile import HostEntry, Hostfile
from launcher.roster import ENDED, Process

LAUNCHER_END_S: Final = 15.0
"""How long a launcher that was asked to stop may take."""
AGENTS_END_S: Final = 20.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """One run in progress, or one whose launcher was killed."""

    folder: Path
    launcher: Process
    since: float
    """Seconds since the epoch."""
    agents: tuple[dict[str, Any], ...]

    @property
    def state(self) -> str:
        """In a few words, as far as it can be seen from here."""
        if not self.launcher.is_here:
            return f"its launcher is on {self.launcher.hostname}"
        return "running" if self.launcher.is_alive else "its launcher was killed"

    def row(self) -> tuple[str, ...]:
        """For ``falcon ps``."""
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        ranks = sum(agent["ranks"] for agent in self.agents)
        hosts = ",".join(agent["host"] for agent in self.agents)
        return (self.folder.name, begun, str(ranks), hosts, str(self.launcher.pid), self.state)


def find_all(runs_dir: str) -> list[Running]:
    """Every run below ``runs_dir`` that has not ended by itself."""
    found = []
    for path in sorted(Path(runs_dir).glob(f"*/{RUNNING_FILE}")):
        try:
            found.append(_read(path))
        except UserError:
            if path.exists():  # else it has just ended
                raise
    return found


def find(run: str, runs_dir: str) -> Running:
    """The run in progress of this folder or id.

    Raises:
        UserError: there is none.
    """
    if found := look(run, runs_dir):
        return found
    raise UserError(f'kill: no such run in progress: "{run}"; falcon ps lists those below {runs_dir}')


def look(run: str, runs_dir: str) -> Running | None:
    """The run in progress of this folder or id; None: it is not in progress."""
    for folder in (Path(run), Path(runs_dir) / run):
        if (folder / RUNNING_FILE).is_file():
            return _read(folder / RUNNING_FILE)
    return None


def check_free(run_dir: Path) -> None:
    """Two launchers must not go on with the same run: each would take the other's checkpoints for its own.

    Raises:
        UserError: another process of this host does so. What runs on another host cannot be seen from here.
    """
    if not (run_dir / RUNNING_FILE).is_file():
        return
    launcher = _read(run_dir / RUNNING_FILE).launcher
    if launcher.is_alive and launcher != Process.this():
        raise UserError(
            f'--resume: this run is in progress: "{run_dir.name}"; wait for its launcher, process {launcher.pid}, '
            f"or end it with: falcon kill {run_dir.name}"
        )


def end(running: Running) -> list[tuple[str, str]]:
    """Ends a run: its launcher where that is alive on this host, else each host's agent; host and what was done.

    Raises:
        LaunchError: a host could not be reached.
    """
    if running.launcher.is_alive:
        launcher = running.launcher
        ended = launcher.end(signal.SIGTERM, LAUNCHER_END_S) or launcher.end(signal.SIGKILL)
        return [(launcher.hostname, "the launcher and all ranks ended" if ended else "the launcher could not be ended")]
    done = _end_agents(running)
    if running.launcher.is_of_this_host:
        (running.folder / RUNNING_FILE).unlink(missing_ok=True)
    elif all(text != ENDED for _, text in done):  # by which it would have learnt that it is not to start again
        done.append((running.launcher.hostname, "the launcher could not be ended from here; run falcon kill there"))
    return done


def _end_agents(running: Running) -> list[tuple[str, str]]:
    hosts = Hostfile(entries=tuple(HostEntry(host=a["host"], user=a["user"]) for a in running.agents))
    with discover.agents(hosts, transport.start) as agents:
        discover.answers(agents.channels, "hello", discover.HELLO_TIMEOUT_S)
        for channel, agent in zip(agents.channels, running.agents, strict=True):
            channel.send("end_run", file=agent["roster"])
        told = discover.answers(agents.channels, "ended_run", AGENTS_END_S)
    return [(agent["host"], answer["text"]) for agent, answer in zip(running.agents, told, strict=True)]


def _read(path: Path) -> Running:
    try:
        values = json.loads(path.read_text())
        values["launcher"] = Process(**values["launcher"])
        return Running(folder=path.parent, **values | {"agents": tuple(values["agents"])})
    except (OSError, ValueError, TypeError, KeyError) as fault:
        raise UserError(f"{path}: cannot be read: {fault!r}; remove it if nothing runs") from fault
