"""All processes one agent runs: prepare, the rendezvous store, ranks. Starts, follows, reaps and ends them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

from falcon_dist.contract import RankResult
from launcher import bind, effort, memory, rundir, stacks
from launcher.child import SIGNALS, Child, Request, rank_order, task_order
from launcher.errors import LaunchError
from launcher.plan import RANK_EVENT_FD, RANK_STORE_FD, NodePlan, RankPlan, TaskPlan

STACKS_S: Final = 1.5
"""How long ranks get to write their stacks."""
FLOOD_BYTES: Final = 4 << 20
"""More than this unsent: output waits in the files."""
FLOOD_AT_END_BYTES: Final = 32 << 20
"""More than this unsent when a process has ended: the rest is left out on the way, never in the files."""


class Host(Protocol):
    """What the crew needs of its agent."""

    def emit(self, event: str, **values: Any) -> None:
        """Tells the launcher."""

    def listen(self, fd: int, callback: Callable[[], None]) -> None:
        """Calls back whenever ``fd`` is readable."""

    def forget(self, fd: int) -> None:
        """The inverse of listen."""

    @property
    def unsent(self) -> int:
        """Bytes the launcher has not taken."""


class Crew:
    """The children of one agent."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._children: dict[int, Child] = {}
        self._tasks: deque[TaskPlan] = deque()
        self._plan: NodePlan | None = None
        self._shared = True
        self._told: set[str] = set()
        self._oom_kills = memory.oom_kills()
        self._stacks_at: float | None = None
        self._waits: dict[int, int] = {}
        self.sockets: dict[str, socket.socket] = {}
        """Listening sockets by the name a TaskPlan knows them by."""

    @property
    def busy(self) -> bool:
        """Something runs."""
        return bool(self._children)

    def used_s(self) -> float:
        """Seconds of processor time that what runs has used."""
        return effort.used_s(self._children)

    def prepare(self, plan: NodePlan) -> None:
        """Takes the plan, writes what it sends along, and runs its preparations one after the other."""
        self._plan = plan
        self._shared = rundir.settle(plan) and rundir.is_the_launchers(plan)
        if not self._shared:
            self._host.emit("apart")
        self._tasks.extend(plan.prepare)
        self._next_task()

    def start_ranks(self) -> None:
        """Starts the store where there is one, and every rank of this node."""
        plan = self._plan
        if plan is None:
            raise LaunchError("told to start before there was a plan")
        if plan.store is not None:
            self._start_task("store", plan, plan.store, keep_input=True)
        for rank in plan.ranks:
            self._start_rank(plan, rank)
        for listening in self.sockets.values():
            listening.close()

    def signal_all(self, number: int) -> None:
        """Sends a signal to every process but the store, which ranks may need to end well."""
        for child in self._children.values():
            if child.order.name != "store":
                child.signal_group(number)

    def ask(self, request: Request, rank: int | None = None) -> None:
        """Asks one rank, or all of this node, for what it said it can do; stacks are told when there was time."""
        asked = [c for c in self._children.values() if c.order.name == "rank" and rank in (None, c.order.rank)]
        for child in asked:
            child.ask(request)
        if request == "stacks":
            self._stacks_at = time.monotonic() + STACKS_S
            self._waits = {child.pid: stacks.waits(child.pid) for child in asked}

    def tell_stacks(self) -> None:
        """Tells where every rank of this node stands, a moment after that was asked."""
        if self._stacks_at is not None and time.monotonic() >= self._stacks_at:
            self._stacks_at = None
            ranks = [c for c in self._children.values() if c.order.name == "rank"]
            self._host.emit("stacks", ranks=[self._standing_of(child) for child in ranks])

    def _standing_of(self, child: Child) -> dict[str, Any]:
        waits_hz = (stacks.waits(child.pid) - self._waits.get(child.pid, 0)) / STACKS_S
        return {"rank": child.order.rank, **stacks.standing(child.pid, child.order.folder, waits_hz)}

    def end_all(self) -> None:
        """Leaves nothing running."""
        for child in self._children.values():
            child.signal_group(signal.SIGKILL)
        bind.end_orphans()  # its own children, and what they started outside their group

    def tell_output(self) -> bool:
        """Passes on what was written since the last time, or a part of it; whether there is more to be told now."""
        for child in self._children.values():
            self._tell_output_of(child, FLOOD_BYTES)
        behind = any(tail.behind for child in self._children.values() for tail in child.tails.values())
        return behind and self._host.unsent <= FLOOD_BYTES

    def reap(self) -> None:
        """Collects every process that has ended."""
        with contextlib.suppress(ChildProcessError):
            # WNOWAIT first: while the leader is a zombie its group's number cannot belong to anybody else.
            while info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                child = self._children.pop(info.si_pid, None)
                if child:
                    child.signal_group(signal.SIGKILL)  # loaders a rank left behind
                _, _, used = os.wait4(info.si_pid, 0)
                if child:
                    exited = info.si_code == os.CLD_EXITED
                    self._ended(child, info.si_status, exited=exited, rss_bytes=used.ru_maxrss * 1024)

    def _next_task(self) -> None:
        if self._plan and self._tasks:
            self._start_task("prepare", self._plan, self._tasks.popleft())
        else:
            self._host.emit("prepared", code=0, signal=None)

    def _start_task(self, name: str, plan: NodePlan, task: TaskPlan, *, keep_input: bool = False) -> None:
        order = dataclasses.replace(task_order(name, plan, task), keep_input=keep_input)
        if task.listens is None:
            self._adopt(Child(order))
            return
        with self._lent(RANK_STORE_FD, self._socket(task.listens)):
            self._adopt(Child(dataclasses.replace(order, pass_fds=(RANK_STORE_FD,))))

    def _start_rank(self, plan: NodePlan, rank: RankPlan) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reader, False)
        fds = (RANK_EVENT_FD, RANK_STORE_FD) if rank.takes_store else (RANK_EVENT_FD,)
        with contextlib.ExitStack() as lent:
            lent.enter_context(self._lent(RANK_EVENT_FD, writer))
            if rank.takes_store:
                lent.enter_context(self._lent(RANK_STORE_FD, self._socket("store")))
            child = Child(rank_order(plan, rank, fds), events=reader)
        os.close(writer)
        if child.refused:
            self.note_once(f"memory policy refused ({child.refused}); memory is placed by first touch")
        self._adopt(child)
        self._host.listen(reader, lambda: self._on_rank_event(child))
        self._host.emit("spawned", rank=rank.rank, pid=child.pid, cpus=child.observed)

    def _socket(self, name: str) -> int:
        if name not in self.sockets:
            raise LaunchError(f"told to start before the {name} was opened")
        return self.sockets[name].fileno()

    @contextlib.contextmanager
    def _lent(self, number: int, fd: int) -> Iterator[None]:
        """Puts a descriptor under the number the plan names, for as long as a child takes to start."""
        os.dup2(fd, number)
        try:
            yield
        finally:
            reserve(number)

    def _adopt(self, child: Child) -> None:
        self._children[child.pid] = child

    def _on_rank_event(self, child: Child) -> None:
        if child.events is None or child.events_fd is None:
            return
        for line in child.events.read():
            try:
                data = dict(json.loads(line))
                if data.get("event") == "takes" and data.get("signal") in SIGNALS:
                    child.takes.add(data["signal"])
                self._host.emit("rank", rank=child.order.rank, data=data)
            except (ValueError, TypeError):
                self.note_once(f"rank {child.order.rank} wrote something that is no event to its event pipe")
        if child.events.ended:
            self._forget_events(child)

    def _forget_events(self, child: Child) -> None:
        if child.events_fd is not None:
            self._host.forget(child.events_fd)
            os.close(child.events_fd)
            child.events_fd = None

    def _tell_output_of(self, child: Child, most_unsent: int, *, final: bool = False) -> None:
        for stream, tail in child.tails.items():
            more = True
            while more and self._host.unsent <= most_unsent:
                lines = tail.read(final=final)
                if lines and child.order.name != "store":
                    told = {"task": child.order.name, "rank": child.order.rank, "stream": stream, "lines": lines}
                    self._host.emit("output", **told)
                more = final and bool(lines)

    def _tell_rest_of(self, child: Child) -> None:
        """What an ended process wrote last; how it ended does not wait for more than a link takes in a moment."""
        self._tell_output_of(child, FLOOD_AT_END_BYTES, final=True)
        left_out = [name for name, tail in child.tails.items() if tail.skip()]
        if left_out:
            self.note_once("output came faster than the link takes it; some lines are in the log files only")

    def _ended(self, child: Child, status: int, *, exited: bool, rss_bytes: int) -> None:
        child.reaped(status)
        self._on_rank_event(child)
        self._forget_events(child)
        self._tell_rest_of(child)
        for tail in child.tails.values():
            tail.close()
        how = {"code": status if exited else None, "signal": None if exited else status}
        # The stack of a crash is followed by those of all other threads: its beginning tells more than its end.
        last = stacks.crash(child.order.folder / "stderr") or list(child.tails["stderr"].last)
        match child.order.name:
            case "rank":
                self._rank_ended(child, rss_bytes, tail=last, **how)
            case "prepare" if status == 0:
                self._next_task()
            case "prepare":
                self._host.emit("prepared", tail=last, oom_kills=self._new_oom_kills(), **how)
            case _:
                self.note_once(f"the rendezvous store ended early: {' '.join(last[-1:]) or how}")

    def _rank_ended(self, child: Child, rss_bytes: int, **how: Any) -> None:
        result = RankResult.read(child.order.folder)
        told = dataclasses.asdict(result) if result else None
        files = {} if self._shared else rundir.kept(child.order.folder)
        facts = {"oom_kills": self._new_oom_kills(), "rss_bytes": rss_bytes, "files": files}
        self._host.emit("exited", rank=child.order.rank, result=told, **facts, **how)

    def _new_oom_kills(self) -> int:
        before, self._oom_kills = self._oom_kills, memory.oom_kills()
        return self._oom_kills - before

    def note_once(self, text: str) -> None:
        """Tells the launcher something it should pass on, the first time only."""
        if text not in self._told:
            self._told.add(text)
            self._host.emit("note", text=text)


def reserve(number: int) -> None:
    """Occupies a descriptor's number, so that nothing else of this process gets it."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, number, inheritable=False)
    if null != number:
        os.close(null)
