"""Ranks as real processes that start in milliseconds: forked from one process that has imported all they need."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest.mock import patch

PROGRAM = "saves.ranks"
EVENTS = "events.jsonl"
ERRORS = "stderr"
LONGEST_S = 120.0
_forks = multiprocessing.get_context("forkserver")


class Seat(NamedTuple):
    """Where a rank sits, and what it is started with."""

    rank: int
    world_size: int
    port: int
    listening: socket.socket | None
    """Rank 0's socket for the run's store."""
    folder: Path
    """For what it tells and its errors."""


def went_on_after(step: int) -> str:
    """The line by which a crew of ``keep_saving`` tells it."""
    return f"went on after step {step}"


def start_server() -> None:
    """Starts the process that ranks are forked from, unless it is there; it looks for modules where this one does."""
    _forks.set_forkserver_preload([PROGRAM])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        forkserver.ensure_running()


def enter(seat: Seat, work: str, args: tuple[object, ...]) -> NoReturn:
    """A forked rank begins; the program is there already, and is not imported by those that only look on."""
    assert PROGRAM in sys.modules, "each rank would import torch for itself"
    from saves import ranks

    ranks.sit(seat, getattr(ranks, work), args)


class Crew:
    """The ranks of one attempt."""

    def __init__(self, work: str, world_size: int, folder: Path, *args: object) -> None:
        """Starts them.

        Args:
            work: name of the function in ranks.py that each rank runs.
            world_size: how many.
            folder: of this attempt; each rank has its own below it.
            args: for the function.
        """
        start_server()
        self.folders = [folder / f"rank_{rank:04d}" for rank in range(world_size)]
        with socket.create_server(("127.0.0.1", 0)) as listening:
            seats = [
                Seat(rank, world_size, listening.getsockname()[1], None if rank else listening, own)
                for rank, own in enumerate(self.folders)
            ]
            self.ranks = [_forks.Process(target=enter, args=(seat, work, args), daemon=True) for seat in seats]
            for rank in self.ranks:
                rank.start()

    def kill(self, *numbers: int) -> None:
        """SIGKILL, for all where none is named."""
        for number in numbers or range(len(self.ranks)):
            self.ranks[number].kill()

    def signal(self, number: int, rank: int = 0) -> None:
        """Sends a signal to one rank."""
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def end(self) -> list[int]:
        """Waits for all; their exit codes, minus the signal where one ended it."""
        for rank in self.ranks:
            rank.join(LONGEST_S)
        codes = [rank.exitcode for rank in self.ranks]
        assert None not in codes, f"{codes}: still running after {LONGEST_S:g} s\n{self.errors()}"
        return [code for code in codes if code is not None]

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        """Until something is so, while all ranks live."""
        deadline = time.monotonic() + LONGEST_S
        while not condition():
            dead = [number for number, rank in enumerate(self.ranks) if rank.exitcode not in (None, 0)]
            assert not dead, f"ranks {dead} ended before {what}\n{self.errors()}"
            assert time.monotonic() < deadline, f"no {what} after {LONGEST_S:g} s"
            time.sleep(0.002)

    def events(self, rank: int = 0) -> list[dict[str, Any]]:
        """What a rank has told so far; a line that was cut off is left out."""
        try:
            lines = (self.folders[rank] / EVENTS).read_text().split("\n")[:-1]
        except OSError:
            return []
        return [json.loads(line) for line in lines]

    def told(self, event: str, key: str, rank: int = 0) -> list[Any]:
        """One value of every event of a kind."""
        return [found[key] for found in self.events(rank) if found["event"] == event]

    def running(self) -> bool:
        """Whether all ranks run still; where one does not, all are to end well."""
        if all(rank.exitcode is None for rank in self.ranks):
            return True
        self.wait(lambda: None not in [rank.exitcode for rank in self.ranks], "the others ended well")
        codes = self.end()
        assert not any(codes), f"{codes}: ended before they were killed\n{self.errors()}"
        return False

    def errors(self, *numbers: int) -> str:
        """What ranks wrote to stderr, all where none is named."""
        files = (self.folders[number] / ERRORS for number in numbers or range(len(self.folders)))
        return "\n".join(f"{file}:\n{file.read_text()[-3000:]}" for file in files if file.is_file())


@contextmanager
def crew(work: str, world_size: int, folder: Path, *args: object) -> Iterator[Crew]:
    """A crew that is dead when the block ends."""
    started = Crew(work, world_size, folder, *args)
    try:
        yield started
    finally:
        started.kill()
        started.end()


def run_once(work: str, folder: Path, *args: object) -> None:
    """One process that does something and ends well."""
    with crew(work, 1, folder, *args) as started:
        assert started.end() == [0], started.errors()
