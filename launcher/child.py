"""One process an agent runs: started bound, its output in files from the first second, its events in a pipe."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from falcon_dist.contract import EMERGENCY_SIGNAL, STACKS_SIGNAL, STOP_SIGNAL
from launcher import bind
from launcher.cpuset import CpuSet
from launcher.errors import LaunchError
from launcher.plan import NodePlan, RankPlan, TaskPlan
from launcher.wire import CHUNK_BYTES, Lines

Request = Literal["stacks", "save", "stop"]
SIGNALS: Final[Mapping[str, int]] = {"stacks": STACKS_SIGNAL, "save": EMERGENCY_SIGNAL, "stop": STOP_SIGNAL}
STREAMS: Final = ("stdout", "stderr")
TAIL_LINES: Final = 15
LONGEST_LINE_BYTES: Final = 1 << 16
AT_ONCE: Final = 1 << 18
"""Bytes of a file that are read at a time: who writes faster than that must not keep the agent from all else."""


class Tail:
    """Follows a file as its writer appends. The file is the record: an agent that dies loses none of it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._rest = b""
        self.behind = False
        """There was more than one read took."""
        self.last: deque[str] = deque(maxlen=TAIL_LINES)

    def read(self, *, final: bool = False) -> list[str]:
        """Lines that are new, as many as one read takes; ``final`` also takes a last line without an end."""
        lines, left, data = list[bytes](), AT_ONCE, b""
        while left > 0 and (data := self._read()):
            left -= len(data)
            *whole, self._rest = (self._rest + data).split(b"\n")
            lines += whole
            if len(self._rest) > LONGEST_LINE_BYTES:
                lines, self._rest = [*lines, self._rest], b""
        self.behind = left <= 0
        if final and self._rest and not self.behind:
            lines, self._rest = [*lines, self._rest], b""
        text = [line.decode(errors="replace") for line in lines]
        self.last.extend(line for line in text if line.strip())
        return text

    def _read(self) -> bytes:
        """What comes next; nothing where the disk does not give it, as of a file server that is away, for now."""
        try:
            return os.read(self._fd, CHUNK_BYTES)
        except OSError:
            return b""

    def skip(self) -> bool:
        """Goes to the last lines, which are remembered; whether anything was left out so."""
        here, end = os.lseek(self._fd, 0, os.SEEK_CUR), os.fstat(self._fd).st_size
        if here >= end:
            return False
        os.lseek(self._fd, max(here, end - LONGEST_LINE_BYTES), os.SEEK_SET)
        while self.read(final=True):
            pass
        return True

    def close(self) -> None:
        """Stops following."""
        os.close(self._fd)


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What to start and how."""

    name: str
    """"rank", "prepare" or "store"."""
    rank: int | None = None
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    folder: Path
    cpus: CpuSet
    mem_nodes: CpuSet = CpuSet()  # noqa: RUF009  # an immutable value
    pass_fds: tuple[int, ...] = ()
    keep_input: bool = False
    """Its standard input stays open as long as the agent lives; otherwise it is empty."""


def task_order(name: str, plan: NodePlan, task: TaskPlan) -> Order:
    """How a helper process of this node is started."""
    folder = Path(task.task_dir)
    return Order(name=name, argv=task.argv, env=task.env, cwd=plan.cwd, folder=folder, cpus=task.cpus)


def rank_order(plan: NodePlan, rank: RankPlan, fds: tuple[int, ...]) -> Order:
    """How a rank of this node is started; ``fds``: descriptors it is handed, under the plan's numbers."""
    return Order(
        name="rank",
        rank=rank.rank,
        argv=rank.argv,
        env=rank.env,
        cwd=plan.cwd,
        folder=Path(rank.rank_dir),
        cpus=rank.binding.cpus,
        mem_nodes=rank.binding.mem_nodes,
        pass_fds=fds,
    )


class Child:
    """A running process of the agent's; the leader of its own session and process group."""

    def __init__(self, order: Order, *, events: int | None = None) -> None:
        """Starts it.

        Raises:
            LaunchError: it cannot be started or bound.
        """
        self.order = order
        self.tails = {name: _empty_file(order.folder, name) for name in STREAMS}
        self.events = None if events is None else Lines(events)
        self.events_fd = events
        self.refused: str | None = None
        self.takes: set[str] = set()
        """Requests that the program said it understands; the signals for them would end any other."""
        self._process = self._start()
        self.pid = self._process.pid
        # Popen comes back when exec has happened: this is the program's own mask.
        self.observed = bind.observed_cpus(self.pid)

    def signal_group(self, number: int) -> None:
        """Sends a signal to it and to all it has started in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def ask(self, request: Request) -> bool:
        """Sends the program itself the signal of a request it understands; returns whether it does."""
        if request in self.takes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, SIGNALS[request])
        return request in self.takes

    def reaped(self, status: int) -> None:
        """The agent has collected its end; frees what it held."""
        self._process.returncode = status  # or Popen would warn of a process nobody waited for
        if self._process.stdin:
            self._process.stdin.close()

    def _start(self) -> subprocess.Popen[bytes]:
        order, agent = self.order, os.getpid()
        folder = order.folder
        with (
            bind.bound(order.cpus, order.mem_nodes) as self.refused,
            (folder / "stdout").open("ab") as out,
            (folder / "stderr").open("ab") as err,
        ):
            try:
                return subprocess.Popen(
                    order.argv,
                    env=dict(order.env),
                    cwd=order.cwd,
                    stdin=subprocess.PIPE if order.keep_input else subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    pass_fds=order.pass_fds,
                    start_new_session=True,
                    preexec_fn=lambda: bind.die_with(agent),  # noqa: PLW1509  # safe: an agent has one thread
                )
            except OSError as fault:
                raise LaunchError(f'{order.name}: cannot start "{order.argv[0]}": {fault.strerror}') from fault


def _empty_file(folder: Path, name: str) -> Tail:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / name).touch(mode=0o600)
    tail = Tail(folder / name)
    tail.skip()  # what an earlier task, or a run of this name, has left in it was told then
    tail.last.clear()
    return tail
