"""Text for a terminal or a pipe, written by a thread: who reads slowly, or not at all, holds up nobody."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import threading
from typing import Final

MOST_WAITING: Final = 10_000
"""Texts that wait to be read; further ones are left out, which is said later."""


class Outlet:
    """Writes to descriptors in the order it was told to. One whose reader is gone takes no more."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        self._left_out = 0
        self._gone: set[int] = set()
        self._thread = threading.Thread(target=self._work, name="outlet", daemon=True)
        self._thread.start()

    def put(self, fd: int, text: str, *, always: bool = True) -> None:
        """Has ``text`` written; unless ``always``, not if too much waits already."""
        if not always and self._waiting.qsize() >= MOST_WAITING:
            self._left_out += 1
            return
        if self._left_out:
            self._waiting.put((fd, f"({self._left_out} lines are left out here, which nobody read)\n"))
            self._left_out = 0
        self._waiting.put((fd, text))

    def close(self) -> None:
        """Waits until all is written, or nobody is there to read it."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        while (told := self._waiting.get()) is not None:
            fd, text = told
            if fd not in self._gone and not _write(fd, text.encode(errors="backslashreplace")):
                self._gone.add(fd)


def _write(fd: int, data: bytes) -> bool:
    """Writes all of it; False: nobody is there to read, as when a terminal was closed."""
    try:
        while data:
            select.select([], [fd], [])  # whoever shares the terminal may have made it not wait
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(fd, data) :]
    except OSError:
        return False
    return True
