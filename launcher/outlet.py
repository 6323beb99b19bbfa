"""Text for a terminal or a pipe, written by a thread: who reads slowly, or not at all, holds up nobody."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import threading
from collections import deque
from typing import Final

MOST_WAITING: Final = 100_000
"""Lines that wait to be read; further ones are left out, which is said later."""
MOST_WAITING_SIZE: Final = 64 << 20
"""The same in characters, where lines are long."""
AT_ONCE: Final = 1 << 20
"""Characters of one call to write: a call for each line is slower than lines can come."""
NO_READER: Final = (errno.EPIPE, errno.EIO)
"""The pipe's other end or the terminal is gone."""
STDERR: Final = 2


class Outlet:
    """Writes to descriptors in the order it was told to. One whose reader is gone takes no more."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, str]] = deque()
        self._unwritten = self._unwritten_size = 0
        self._left_out = 0
        self._closing = False
        self._changed = threading.Condition()
        self._gone: set[int] = set()
        self._thread = threading.Thread(target=self._work, name="outlet", daemon=True)
        self._thread.start()

    def put(self, fd: int, text: str, *, always: bool = True) -> None:
        """Has ``text`` written; unless ``always``, not if too much waits already."""
        with self._changed:
            if not always and (self._unwritten >= MOST_WAITING or self._unwritten_size >= MOST_WAITING_SIZE):
                self._left_out += text.count("\n")
                return
            if self._left_out:
                self._add(fd, f"({self._left_out} lines are left out here, which nobody read)\n")
                self._left_out = 0
            self._add(fd, text)

    def close(self) -> None:
        """Waits until all is written, or nobody is there to read it."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _add(self, fd: int, text: str) -> None:
        self._waiting.append((fd, text))
        self._unwritten += text.count("\n")
        self._unwritten_size += len(text)
        self._changed.notify()

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        while (told := self._next()) is not None:
            fd, text = told
            if fd not in self._gone and (fault := _write(fd, text.encode(errors="backslashreplace"))):
                self._gone.add(fd)
                self._complain(fd, fault)
            with self._changed:
                self._unwritten -= text.count("\n")
                self._unwritten_size -= len(text)

    def _next(self) -> tuple[int, str] | None:
        """What is to be written at once; None: that was all."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            texts: list[str] = []
            fd, size = self._waiting[0][0] if self._waiting else -1, 0
            while self._waiting and self._waiting[0][0] == fd and size < AT_ONCE:
                texts.append(self._waiting.popleft()[1])
                size += len(texts[-1])
            return (fd, "".join(texts)) if texts else None

    def _complain(self, fd: int, fault: OSError) -> None:
        """Says what became of an output that somebody does want, as on a full disk."""
        if fault.errno not in NO_READER and fd != STDERR and STDERR not in self._gone:
            _write(STDERR, f"output cannot be written any more: {fault.strerror}; the run folder has all\n".encode())


def _write(fd: int, data: bytes) -> OSError | None:
    """Writes all of it; what is wrong where that cannot be, as when a terminal was closed."""
    try:
        while data:
            select.select([], [fd], [])  # whoever shares the terminal may have made it not wait
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(fd, data) :]
    except OSError as fault:
        return fault
    return None
