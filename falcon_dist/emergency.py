"""A survivor's checkpoint: a peer is gone, the launcher asks one rank for the last finished step, and it is kept.

Every rank of plain data parallelism holds the whole state, and while gradients are computed and exchanged nothing
of it changes. So any rank can write it down at any time but within the optimizer's update, also while its main
thread hangs in a collective that will never end: another thread listens for the signal and does the work.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from falcon_dist.contract import EMERGENCY_SIGNAL, EMERGENCY_WAIT_S, EXIT_FAILED, PEER_IS_GONE
from falcon_dist.metrics import Reporter


class Updates:
    """Keeps the optimizer's update apart from whoever reads the state, and counts the updates."""

    def __init__(self, step: int, optimizer: Optimizer) -> None:
        """Counts on from ``step``. An ``optimizer.step()`` that fails half-way leaves the state closed for good."""
        self._lock = threading.Lock()
        self._step = step
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)

    @contextmanager
    def held(self) -> Iterator[int]:
        """No update happens within the block; the number of the last finished one."""
        with self._lock:
            yield self._step

    def _begin(self, *_: Any) -> None:
        self._lock.acquire()

    def _end(self, *_: Any) -> None:
        self._step += 1
        self._lock.release()


class Emergency:
    """Answers EMERGENCY_SIGNAL with a checkpoint, from a thread of its own."""

    def __init__(self, save: Callable[[], tuple[Path, int]] | None, reporter: Reporter) -> None:
        """Begins to listen; only the main thread can.

        Args:
            save: commits the last finished step, unless it is committed already, and returns its folder and step;
                None: this rank cannot do that alone, and does not offer it.
            reporter: tells the launcher.
        """
        self._reporter = reporter
        self._asked = threading.Event()
        self._answered = threading.Event()
        self._offered = False
        self._can_save = save is not None
        if save is not None:
            self._listen(save)

    def _listen(self, save: Callable[[], tuple[Path, int]]) -> None:
        # Python's own signal handlers run between two bytecodes of the main thread, which may never come; the wake-up
        # descriptor is written to at once, whatever that thread does.
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.signal(EMERGENCY_SIGNAL, lambda *_: None)
        signal.siginterrupt(EMERGENCY_SIGNAL, False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._answer, args=(reader, save), name="emergency", daemon=True).start()

    def offer(self) -> None:
        """Tells the launcher, once, that this rank has something to save."""
        if self._can_save and not self._offered:
            self._offered = True
            self._reporter.takes("save")

    def wait_after(self, error: BaseException) -> bool:
        """Where a collective failed because a peer is gone: leaves the launcher time to ask and the answer its own.

        Returns:
            Whether a peer is gone; one is where the launcher asked, whatever the error says.
        """
        peer_is_gone = any(sign in str(error) for sign in PEER_IS_GONE)
        if self._offered and peer_is_gone:
            self._asked.wait(EMERGENCY_WAIT_S)
        if self._asked.is_set():
            self._answered.wait()
            return True
        return peer_is_gone

    def _answer(self, reader: socket.socket, save: Callable[[], tuple[Path, int]]) -> None:
        while EMERGENCY_SIGNAL not in reader.recv(64):  # other signals with a Python handler are told here too
            pass
        self._asked.set()
        try:
            path, step = save()
        except Exception:  # noqa: BLE001 - whatever it was, another rank may do better, and is asked when this one ends
            print("emergency checkpoint: failed", file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(EXIT_FAILED)
        self._reporter.checkpoint(path, step, emergency=True)
        self._answered.set()
