"""One srun for all agents of a run, and a channel to each of them over its one input and output."""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Final

from launcher import frames, slurm
from launcher.errors import LaunchError
from launcher.hostfile import HostEntry
from launcher.slurm import Allocation
from launcher.transport import Channel, Transport, allow_files
from launcher.wire import HELD, Lines

BRANCH: Final = (sys.executable, "-P", "-m", "launcher.branch")
END_S: Final = 8.0
"""How long srun may take to end when no agent is wanted any more."""
UNKNOWN: Final = 1
"""Exit code of a task whose own was never told."""


def within(allocation: Allocation) -> Transport:
    """Starts agents on nodes of a Slurm job."""

    def start(entries: Sequence[HostEntry]) -> Iterator[Channel]:
        allow_files(len(entries))
        hosts = [entry.host for entry in entries]
        trunk = Trunk(hosts, slurm.srun_words(hosts, allocation))
        for host, branch in trunk.branches.items():
            yield Channel(host, branch, branch.errors)

    return start


class Branch:
    """One task of srun, as a Channel sees it."""

    def __init__(self, trunk: Trunk) -> None:
        commands, events = os.pipe(), os.pipe()
        self.commands, self.stdin = commands[0], os.fdopen(commands[1], "wb", buffering=0)
        self.stdout, self._events = os.fdopen(events[0], "rb", buffering=0), os.fdopen(events[1], "wb")
        self.over = threading.Event()
        """The task has ended, or nothing more is expected of it."""
        self.errors = os.dup(trunk.errors)
        """What srun complains of, for the channel to close."""
        self._code = UNKNOWN
        self._trunk = trunk

    @property
    def pid(self) -> int:
        """The process on this machine: srun."""
        return self._trunk.pid

    def ends_within(self, timeout_s: float) -> bool:
        """Waits for the end of the task, whose input has been closed."""
        self._trunk.released(self)
        return self.over.wait(timeout_s)

    def kill(self) -> None:
        """Nothing more is expected of it; srun itself ends when no task is wanted any more."""
        self.over.set()

    def wait(self) -> int:
        """Its exit code."""
        return self._code

    def tell(self, words: bytes) -> None:
        """Passes on what the agent said."""
        with contextlib.suppress(OSError):  # the channel may be closed
            self._events.write(words)
            self._events.flush()

    def end(self, code: int) -> None:
        """The task has ended."""
        if not self._events.closed:
            self._code = code
            with contextlib.suppress(OSError):
                self._events.close()
        self.over.set()


class Trunk:
    """A running srun with two threads that move lines: commands down to it, events up from it."""

    def __init__(self, hosts: Sequence[str], words: Sequence[str]) -> None:
        """Starts it.

        Raises:
            LaunchError: there is no srun here.
        """
        self.errors = os.memfd_create("srun")
        self._srun = _start(words, self.errors)
        self.pid = self._srun.pid
        self.branches = {host: Branch(self) for host in hosts}
        self._wanted = set(self.branches.values())
        self._alarm = threading.Timer(END_S, self._srun.kill)
        for work in (self._send, self._receive):
            threading.Thread(target=work, name=f"srun{work.__name__}").start()

    def released(self, branch: Branch) -> None:
        """A task is not wanted any more; with the last one srun gets its time to end."""
        if branch in self._wanted:
            self._wanted.discard(branch)
            if not self._wanted:
                self._alarm.start()

    def _send(self) -> None:
        """Commands of all channels, until all have hung up."""
        if self._srun.stdin is None:
            raise ValueError("srun needs its input")
        # Outermost: closing a pipe that nobody reads any more can fail as well, where it still holds something.
        with contextlib.suppress(BrokenPipeError), self._srun.stdin as down, selectors.DefaultSelector() as selector:
            for host, branch in self.branches.items():
                selector.register(branch.commands, selectors.EVENT_READ, (host, Lines(branch.commands)))
            while selector.get_map():
                for key, _ in selector.select():
                    host, lines = key.data
                    for line in lines.read():
                        down.write(frames.down(host, line))
                    if lines.ended:
                        down.write(frames.down_end(host))
                        selector.unregister(key.fileobj)
                    down.flush()
        for branch in self.branches.values():
            os.close(branch.commands)

    def _receive(self) -> None:
        """What the tasks say, until srun has ended."""
        if self._srun.stdout is None:
            raise ValueError("srun needs its output")
        joiner = frames.Joiner(frozenset(self.branches))
        with self._srun.stdout as up:
            for frame in up:
                try:
                    said = joiner.take(frame.rstrip(b"\n"))
                except ValueError as noise:  # what a prolog prints
                    os.write(self.errors, f"{noise}\n".encode())
                    continue
                if said is not None and said.code is not None:
                    self.branches[said.host].end(said.code)
                elif said is not None:
                    self.branches[said.host].tell(HELD if said.held else said.line + b"\n")
        code = self._srun.wait()
        os.close(self.errors)
        self._alarm.cancel()
        for branch in self.branches.values():
            branch.end(code)


def _start(words: Sequence[str], errors: int) -> subprocess.Popen[bytes]:
    environ = {name: value for name, value in os.environ.items() if name not in slurm.NOT_FOR_SRUN}
    pipe = subprocess.PIPE
    try:
        # A session of its own: Ctrl-C at the terminal reaches the launcher alone, which decides what to do.
        return subprocess.Popen(
            (*words, *BRANCH), stdin=pipe, stdout=pipe, stderr=errors, env=environ, start_new_session=True
        )
    except OSError as fault:
        remedy = "put it on PATH, or use --hosts localhost for this machine alone"
        raise LaunchError(f'cannot start "srun": {fault.strerror}; {remedy}') from fault
