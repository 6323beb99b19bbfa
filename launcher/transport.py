"""How agents are started and talked to: one JSON object a line, in both directions. No port is opened for it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from launcher.errors import LaunchError
from launcher.hostfile import HostEntry

CHUNK_BYTES = 1 << 16


class Lines:
    """Cuts what arrives on a descriptor into lines."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest = b""
        self.ended = False

    def read(self) -> list[bytes]:
        """Whole lines of one read; sets ``ended`` at the end of the stream."""
        try:
            data = os.read(self._fd, CHUNK_BYTES)
        except BlockingIOError:
            return []
        self.ended = not data
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines


class Channel:
    """One agent. Closing its input makes it kill its ranks and go."""

    def __init__(self, host: str, process: subprocess.Popen[bytes]) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("an agent's process needs both pipes")
        self.host = host
        self._process = process
        self._input = process.stdin
        self._output = process.stdout
        self._lines = Lines(process.stdout.fileno())

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
        """Events that have arrived; waits for the first.

        Raises:
            LaunchError: something other than an event arrived.
        """
        return [self._event(line) for line in self._lines.read()]

    def send(self, command: str, **values: Any) -> None:
        """Sends a command; an agent that is gone is told by its end of stream, not here."""
        try:
            self._input.write(json.dumps({"command": command, **values}).encode() + b"\n")
            self._input.flush()
        except BrokenPipeError:
            return

    def close(self, timeout_s: float = 5.0) -> int | None:
        """Ends the agent and returns its exit code (-n for signal n); None: it had to be killed."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return None
        finally:
            self._output.close()

    def _event(self, line: bytes) -> dict[str, Any]:
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError) as fault:
            shown = line[:200].decode(errors="replace")
            raise LaunchError(f'{self.host}: the agent said something that is no event: "{shown}"') from fault


Transport = Callable[[HostEntry], Channel]
"""Starts the agent of one host."""


def local(entry: HostEntry) -> Channel:
    """An agent on this machine."""
    # A session of its own: Ctrl-C at the terminal reaches the launcher alone, which decides what to do.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "launcher.agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    return Channel(entry.host, process)
