"""The agent of one node: ``python -m launcher.agent``.

Commands come as JSON lines on standard input, events go as JSON lines to standard output:

    -> {"command": "open_store", "addr": A}      <- {"event": "store", "port": N}
    -> {"command": "prepare", "plan": NodePlan}  <- {"event": "prepared", "code" | "signal"}
    -> {"command": "start"}                      <- {"event": "spawned", "rank", "pid", "cpus"} for each rank
    -> {"command": "signal", "number": N}

besides ``hello`` at the start and ``output``, ``rank`` (a rank's own event), ``exited``, ``note`` and ``fault`` when
they happen. End of input, from a launcher that ended in whatever way, means: kill all that was started, and go.
It has one thread, because it forks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from falcon_dist.contract import RankResult
from launcher import bind, sysfs
from launcher.child import Child, rank_order, task_order
from launcher.errors import LaunchError, UserError
from launcher.plan import RANK_EVENT_FD, RANK_STORE_FD, NodePlan, RankPlan, TaskPlan
from launcher.transport import Lines

POLL_S: Final = 0.1
"""How often files of running children are looked at for new lines."""
VERSIONS_OF: Final = ("falcon-dist", "torch", "transformers", "trl", "oneccl-cpu-devel")
PROTOCOL: Final = 1


class Agent:
    """Runs one node's part of an attempt."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._commands = Lines(sys.stdin.fileno())
        self._children: dict[int, Child] = {}
        self._store: socket.socket | None = None
        self._plan: NodePlan | None = None
        self._told: set[str] = set()
        self._leaving = False
        self._woken_by, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> None:
        """Answers commands until the input ends, then leaves nothing running."""
        self._take_signals()
        self._listen(sys.stdin.fileno(), self._on_command)
        self._listen(self._woken_by, self._on_wake)
        try:
            self._emit("hello", **_hello())
            while not self._leaving:
                for key, _ in self._selector.select(POLL_S if self._children else None):
                    key.data()
                self._tell_output()
        except BrokenPipeError:
            pass  # nobody listens any more: the same as the end of input
        finally:
            self._end_all()

    def _take_signals(self) -> None:
        # Handlers rather than SIG_IGN, which ranks would inherit; the wake-up descriptor tells what came.
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)

    def _listen(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def _on_command(self) -> None:
        for line in self._commands.read():
            values = json.loads(line)
            try:
                self._obey(values.pop("command"), values)
            except (LaunchError, OSError) as fault:
                self._emit("fault", text=str(fault))
                self._leaving = True  # a node that cannot do its part has none
        self._leaving |= self._commands.ended

    def _on_wake(self) -> None:
        numbers = os.read(self._woken_by, 512)
        self._leaving |= signal.SIGTERM in numbers or signal.SIGHUP in numbers
        self._reap()

    def _obey(self, command: str, values: dict[str, Any]) -> None:
        match command:
            case "open_store":
                self._open_store(values["addr"])
            case "prepare":
                self._prepare(NodePlan.from_json(values["plan"]))
            case "start":
                self._start_ranks()
            case "signal":
                self._signal_all(values["number"])
            case _:
                raise LaunchError(f'unknown command: "{command}"')

    def _open_store(self, addr: str) -> None:
        family = socket.AF_INET6 if ":" in addr else socket.AF_INET
        self._store = socket.socket(family, socket.SOCK_STREAM)
        self._store.bind((addr, 0))  # this address only, and a port the kernel picks: nobody can take it in between
        self._store.listen(1024)
        self._emit("store", port=self._store.getsockname()[1])

    def _prepare(self, plan: NodePlan) -> None:
        self._plan = plan
        if plan.prepare is None:
            self._emit("prepared", code=0, signal=None)
        else:
            self._adopt(Child(task_order("prepare", plan, plan.prepare)))

    def _start_ranks(self) -> None:
        plan = self._plan
        if plan is None:
            raise LaunchError("told to start before there was a plan")
        if plan.store is not None:
            self._start_store(plan, plan.store)
        for rank in plan.ranks:
            self._start_rank(plan, rank)
        if self._store is not None:
            self._store.close()

    def _start_store(self, plan: NodePlan, task: TaskPlan) -> None:
        with self._lent(RANK_STORE_FD, self._store_fd()):
            order = task_order("store", plan, task)
            self._adopt(Child(dataclasses.replace(order, pass_fds=(RANK_STORE_FD,), keep_input=True)))

    def _start_rank(self, plan: NodePlan, rank: RankPlan) -> None:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reader, False)
        fds = (RANK_EVENT_FD, RANK_STORE_FD) if rank.takes_store else (RANK_EVENT_FD,)
        with contextlib.ExitStack() as lent:
            lent.enter_context(self._lent(RANK_EVENT_FD, writer))
            if rank.takes_store:
                lent.enter_context(self._lent(RANK_STORE_FD, self._store_fd()))
            child = Child(rank_order(plan, rank, fds), events=reader)
        os.close(writer)
        if child.refused:
            self._note_once(f"memory policy refused ({child.refused}); memory is placed by first touch")
        self._adopt(child)
        self._listen(reader, lambda: self._on_rank_event(child))
        self._emit("spawned", rank=rank.rank, pid=child.pid, cpus=child.observed)

    def _store_fd(self) -> int:
        if self._store is None:
            raise LaunchError("told to start before the rendezvous was opened")
        return self._store.fileno()

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

    def _signal_all(self, number: int) -> None:
        for child in self._children.values():
            if child.order.name != "store":  # ranks may need it to end well
                child.signal_group(number)

    def _on_rank_event(self, child: Child) -> None:
        if child.events is None or child.events_fd is None:
            return
        for line in child.events.read():
            try:
                self._emit("rank", rank=child.order.rank, data=dict(json.loads(line)))
            except (ValueError, TypeError):
                self._note_once(f"rank {child.order.rank} wrote something that is no event to its event pipe")
        if child.events.ended:
            self._forget_events(child)

    def _forget_events(self, child: Child) -> None:
        if child.events_fd is not None:
            self._selector.unregister(child.events_fd)
            os.close(child.events_fd)
            child.events_fd = None

    def _tell_output(self) -> None:
        for child in self._children.values():
            self._tell_output_of(child, final=False)

    def _tell_output_of(self, child: Child, *, final: bool) -> None:
        for stream, tail in child.tails.items():
            lines = tail.read(final=final)
            if lines and child.order.name != "store":
                self._emit("output", task=child.order.name, rank=child.order.rank, stream=stream, lines=lines)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            # WNOWAIT first: while the leader is a zombie its group's number cannot belong to anybody else.
            while info := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                child = self._children.pop(info.si_pid, None)
                if child:
                    child.signal_group(signal.SIGKILL)  # loaders a rank left behind
                os.waitpid(info.si_pid, 0)
                if child:
                    exited = info.si_code == os.CLD_EXITED
                    self._ended(child, info.si_status, exited=exited)

    def _ended(self, child: Child, status: int, *, exited: bool) -> None:
        child.reaped(status)
        self._on_rank_event(child)
        self._forget_events(child)
        self._tell_output_of(child, final=True)
        for tail in child.tails.values():
            tail.close()
        how = {"code": status if exited else None, "signal": None if exited else status}
        last = list(child.tails["stderr"].last)
        match child.order.name:
            case "rank":
                result = RankResult.read(child.order.folder)
                told = dataclasses.asdict(result) if result else None
                self._emit("exited", rank=child.order.rank, tail=last, result=told, **how)
            case "prepare":
                self._emit("prepared", tail=last, **how)
            case _ if not self._leaving:
                self._note_once(f"the rendezvous store ended early: {' '.join(last[-1:]) or how}")

    def _note_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._emit("note", text=text)

    def _emit(self, event: str, **values: Any) -> None:
        data = json.dumps({"event": event, **values}).encode() + b"\n"
        while data:
            data = data[os.write(sys.stdout.fileno(), data) :]

    def _end_all(self) -> None:
        for child in self._children.values():
            child.signal_group(signal.SIGKILL)
        bind.end_orphans()  # its own children, and what they started outside their group


def reserve(number: int) -> None:
    """Occupies a descriptor's number, so that nothing else of this process gets it."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, number, inheritable=False)
    if null != number:
        os.close(null)


def _hello() -> dict[str, Any]:
    return {
        "protocol": PROTOCOL,
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
        "python": sys.executable,
        "versions": _versions(),
        "topology": sysfs.read().to_json(),
    }


def _versions() -> dict[str, str]:
    # importlib.metadata would tell the same in ten times the time, which every --dry-run waits for.
    entries = [p.name for place in reversed(sys.path) if place for p in Path(place).glob("*.dist-info")]
    parts = [name.removesuffix(".dist-info").rpartition("-") for name in entries]
    installed = {name.lower().replace("_", "-"): version for name, _, version in parts}
    return {name: installed[name] for name in VERSIONS_OF if name in installed}


def main() -> None:
    """Serves the launcher at the other end of standard input and output."""
    for number in (RANK_EVENT_FD, RANK_STORE_FD):
        reserve(number)
    bind.adopt_orphans()
    try:
        Agent().serve()
    except UserError as fault:
        sys.exit(f"launcher.agent: {fault}")


if __name__ == "__main__":
    main()
