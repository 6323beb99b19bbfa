"""Signals that ask the launcher to stop, as something its loop can wait for."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

from falcon_dist.contract import EXIT_STOPPED
from launcher.errors import Interruption
from launcher.events import Cause, Event, Interrupted, MakeWay
from launcher.render import signal_name

STOPPING_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def stopping_signals() -> Iterator[int]:
    """A descriptor on which signals that ask the launcher to stop arrive by their numbers."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = {number: signal.signal(number, lambda *_: None) for number in _taken()}
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


@contextmanager
def interruptible() -> Iterator[None]:
    """Signals that ask the launcher to end raise, other than in a block of stopping_signals inside this one.

    Raises:
        Interruption: one came.
    """
    before = {number: signal.signal(number, _raise) for number in _taken() if number != signal.SIGTSTP}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, _: FrameType | None) -> NoReturn:
    raise Interruption(number)


def cause_of(number: int) -> Cause:
    """Why a run is over that got this signal between two attempts."""
    if number == signal.SIGUSR1:
        return Cause(kind="yield", exit_code=EXIT_STOPPED, text="asked to make way")
    return Cause(kind="interrupt", exit_code=128 + number)


def _taken() -> list[signal.Signals]:
    """All that are to be acted on: not what nohup had ignored, so that the run outlives a logout."""
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    return [number for number in (*STOPPING_SIGNALS, signal.SIGTSTP) if number not in ignored]


def meaning(number: int) -> tuple[Event | None, str]:
    """What a signal to the launcher asks for, and what the user is told."""
    name = signal_name(number)
    if number == signal.SIGTSTP:
        return None, f"{name}: not suspended: hosts that hear nothing end their ranks"
    if number == signal.SIGUSR1:
        return MakeWay(), f"{name}: all ranks end after the step they are in, and save"
    return Interrupted(signal=number), f"{name}: stopping all ranks; once more to kill them at once"
