"""How agents are started and talked to: one JSON object a line, in both directions. No port is opened for it."""

from __future__ import annotations

import json
import os
import resource
import select
import shlex
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Final, Protocol

from launcher.errors import LaunchError
from launcher.hostfile import LOCAL, HostEntry
from launcher.render import signal_name
from launcher.wire import Lines, Outbox

AGENT: Final = (sys.executable, "-P", "-m", "launcher.agent")
CONNECT_TIMEOUT_S: Final = 10
SSH: Final = (
    *("ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_TIMEOUT_S}"),
    # A connection of its own, that ends with this process and with a dead link, and carries nothing else.
    *("-o", "ControlPath=none", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
    *("-o", "ClearAllForwardings=yes", "-o", "ForwardAgent=no", "-o", "ForwardX11=no"),
    *("-o", "EscapeChar=none", "-o", "LogLevel=ERROR"),
)
TAIL_BYTES: Final = 4096
FILES_OF_HOST: Final = 6
"""Open files for each host: its agent's input and output, both ends of them under srun, what the way complains of, and
one while it starts."""
FILES_OF_OURS: Final = 64
"""Those that the launcher has beside them, at most."""


class Way(Protocol):
    """A process that is an agent or leads to one."""

    @property
    def pid(self) -> int:
        """On this machine."""

    @property
    def stdin(self) -> IO[bytes]:
        """Closing it asks the agent to end."""

    @property
    def stdout(self) -> IO[bytes]:
        """What the agent says."""

    def ends_within(self, timeout_s: float) -> bool:
        """Waits for its end, but no longer."""

    def kill(self) -> None:
        """Gives it up."""

    def wait(self) -> int:
        """Its exit code, -n for signal n."""


class Spawned:
    """A process of one agent's own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("an agent's process needs both pipes")
        self._process = process
        self.pid, self.stdin, self.stdout = process.pid, process.stdin, process.stdout
        self.kill, self.wait = process.kill, process.wait

    def ends_within(self, timeout_s: float) -> bool:
        """Waits for its end; Popen.wait() with a time limit would look every 50 ms only, and --dry-run feels that."""
        if self._process.poll() is not None:
            return True
        fd = os.pidfd_open(self.pid)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        try:
            return bool(poll.poll(timeout_s * 1000))
        finally:
            os.close(fd)


class Channel:
    """One agent. Closing its input makes it kill its ranks and go."""

    def __init__(self, host: str, process: Way, errors: int | None = None) -> None:
        self.host = host
        self.heard_at = time.monotonic()
        """When the agent last said something."""
        self.held_at = 0.0
        """When it was last said that a disk holds it."""
        self.died: int | None = None
        """Signal that killed the agent, as the process beside it told."""
        self._process = process
        self._errors = errors
        """What the way to the agent complains of; this channel's own descriptor."""
        self._said = b""
        self._output = process.stdout
        self._lines = Lines(process.stdout.fileno())
        self.outbox = Outbox(process.stdin.fileno())
        self._greeted = False
        self._noise: deque[str] = deque(maxlen=3)

    @property
    def pid(self) -> int:
        """The process on this machine: the agent, or what reaches it."""
        return self._process.pid

    def fileno(self) -> int:
        """Descriptor that is readable when events are there."""
        return self._output.fileno()

    @property
    def ended(self) -> bool:
        """The agent has closed its end."""
        return self._lines.ended

    def receive(self) -> list[dict[str, Any]]:
        """Events that have arrived; waits for nothing.

        Raises:
            LaunchError: something other than an event arrived.
        """
        before, lines = self._lines.received, self._lines.read()
        now = time.monotonic()
        if self._lines.received > before:  # a long event takes its time over a slow link, and is a sign of life
            self.heard_at = now
        self.held_at = now if self._lines.held else self.held_at
        events, fault = list[dict[str, Any]](), None
        for line in lines:
            try:
                events += filter(None, [self._event(line)])
            except LaunchError as told:
                fault = fault or told
        if fault and not self.died:  # of an agent that was killed the last line may be half a one
            raise fault
        return events

    def send(self, command: str, **values: Any) -> None:
        """Sends a command; an agent that is gone is told by its end of stream, not here."""
        self.outbox.put({"command": command, **values})

    @property
    def greeted(self) -> bool:
        """The agent has said its first words."""
        return self._greeted

    def hang_up(self) -> None:
        """Asks the agent to end."""
        self.outbox.broken = True  # the descriptor's number will be somebody else's
        if not self._process.stdin.closed:
            self._process.stdin.close()

    def close(self, timeout_s: float = 5.0) -> int | None:
        """Ends the agent and returns its exit code (-n for signal n); None: it had to be killed."""
        self.hang_up()
        ended = self._process.ends_within(timeout_s)
        if not ended:
            self._process.kill()
        code = self._process.wait()
        self._output.close()
        if self._errors is not None:
            self._said = _tail(self._errors)
            os.close(self._errors)
            self._errors = None
        return code if ended else None

    def last_words(self) -> str:
        """What the way to the agent said besides events: ssh's complaint, a login's banner; may be empty."""
        said = self._said if self._errors is None else _tail(self._errors)
        lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
        return (lines or list(self._noise) or [""])[-1]

    def how_ended(self, code: int | None) -> str:
        """The signal that killed the agent, or else its exit code as ``close`` returned it, with its last words."""
        number = self.died or (-code if code is not None and code < 0 else None)
        words = self.last_words()
        return signal_name(number) if number else f"exit code {code}{f': {words}' if words else ''}"

    def _event(self, line: bytes) -> dict[str, Any] | None:
        try:
            event = dict(json.loads(line))
        except (ValueError, TypeError) as fault:
            shown = line[:200].decode(errors="replace")
            if self._greeted and shown:
                raise LaunchError(f'{self.host}: the agent said something that is no event: "{shown}"') from fault
            if shown.strip():  # a banner, or what a login script prints
                self._noise.append(shown)
            return None
        self._greeted |= event.get("event") == "hello"
        self.died = event["signal"] if event.get("event") == "died" else self.died
        return event if self._greeted else None


Transport = Callable[[Sequence[HostEntry]], Iterator[Channel]]
"""Starts the agents of hosts, in their order."""


def start(entries: Sequence[HostEntry]) -> Iterator[Channel]:
    """An agent on this machine for the entry that names it, one over ssh for every other.

    Raises:
        LaunchError: there is no ssh here, or so many hosts need more open files than this process may have.
    """
    allow_files(len(entries))
    for entry in entries:
        here = entry.user is None and entry.host in (LOCAL, socket.gethostname())
        yield local(entry) if here else ssh(entry)


def allow_files(hosts: int) -> None:
    """Has this process, and what it starts, open as many files as so many hosts need, where the soft limit is lower
    (getrlimit(2)).

    Raises:
        LaunchError: the hard limit is lower too.
    """
    count = FILES_OF_HOST * hosts + FILES_OF_OURS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= count:
        return
    if hard != resource.RLIM_INFINITY and hard < count:
        raise LaunchError(f"open files: {count} are needed for {hosts} hosts, {hard} are allowed; raise ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def local(entry: HostEntry) -> Channel:
    """An agent on this machine."""
    # A session of its own: Ctrl-C at the terminal reaches the launcher alone, which decides what to do.
    process = subprocess.Popen(AGENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    return Channel(entry.host, Spawned(process))


def ssh(entry: HostEntry) -> Channel:
    """An agent on another machine, with the interpreter at the same path.

    Raises:
        LaunchError: there is no ssh here.
    """
    user = () if entry.user is None else ("-l", entry.user)
    errors = os.memfd_create("ssh")
    words = (*SSH, *user, "--", entry.host, shlex.join(AGENT))
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
    except OSError as fault:
        raise LaunchError(f'{entry.host}: cannot start "ssh": {fault.strerror}; install an ssh client') from fault
    return Channel(entry.host, Spawned(process), errors)


def _tail(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    return os.pread(fd, TAIL_BYTES, max(0, size - TAIL_BYTES))
