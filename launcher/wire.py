"""Lines of JSON over a descriptor, both ways. Neither end ever waits: a dead link must not stop anybody."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Mapping
from typing import Any, Final

CHUNK_BYTES: Final = 1 << 16
BEAT_S: Final = 1.0
"""How often launcher and agent tell each other that they live."""
SILENCE_S: Final = 10.0
"""After so long without a word the other end counts as dead."""
HELD: Final = b"\0"
"""Said between lines, or amid one, for an agent that cannot speak because the kernel holds it, as it does where a disk
stands still. JSON has no such byte."""


class Lines:
    """Cuts what arrives on a descriptor into lines."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._rest: list[bytes] = []
        self.ended = False
        self.held = False
        """The last read brought a word that the other end is held."""
        self.received = 0
        """Bytes so far, those of a line that is not whole yet among them."""

    def read(self) -> list[bytes]:
        """Whole lines of one read; sets ``ended`` at the end of the stream."""
        try:
            data = os.read(self._fd, CHUNK_BYTES)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        self.ended, self.held = not data, HELD in data
        data = data.replace(HELD, b"")
        self.received += len(data)
        first, *others = data.split(b"\n")
        self._rest.append(first)
        if not others:  # nothing is joined before the end is there: a long line would be copied at every read
            return []
        lines = [b"".join(self._rest), *others[:-1]]
        self._rest = [others[-1]]
        return lines


class Outbox:
    """Sends JSON lines as fast as the other end takes them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._waiting = bytearray()
        self.broken = False
        """The other end is gone."""
        os.set_blocking(fd, False)

    @property
    def waiting(self) -> int:
        """Bytes the other end has not taken yet."""
        return len(self._waiting)

    def fileno(self) -> int:
        """Descriptor that is writable when ``flush`` has something to do."""
        return self._fd

    def put(self, message: Mapping[str, Any]) -> None:
        """Sends a message, now or when there is room."""
        if not self.broken:
            self._waiting += json.dumps(message).encode() + b"\n"
            self.flush()

    def flush_within(self, seconds: float) -> None:
        """Sends what waits, and waits for room for it at most so long."""
        deadline, room = time.monotonic() + seconds, select.poll()
        room.register(self._fd, select.POLLOUT)
        while self._waiting and room.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
            self.flush()

    def flush(self) -> None:
        """Sends what waits, as far as it goes."""
        if self.broken:
            return
        try:
            while self._waiting:
                del self._waiting[: os.write(self._fd, bytes(self._waiting[:CHUNK_BYTES]))]
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            self.broken = True
            self._waiting.clear()
