"""The only loop of a launcher: events of the agents -> decide -> actions -> RunReport."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from launcher import bind, supervise
from launcher.console import Console
from launcher.discover import Agents
from launcher.errors import LaunchError
from launcher.plan import LaunchPlan
from launcher.record import Record
from launcher.render import output_line, signal_name
from launcher.report import RunReport
from launcher.supervise import Ended, Exited, Faulted, Interrupted, Lost, Mismatched, Prepared, TimeUp

STOPPING_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Run:
    """One attempt in progress."""

    def __init__(self, plan: LaunchPlan, agents: Agents, console: Console, record: Record) -> None:
        self._plan = plan
        self._channels = dict(enumerate(agents.channels))
        self._console = console
        self._record = record
        self._deadline: float | None = None
        self._selector = selectors.DefaultSelector()
        self._state = supervise.begin(tuple(n.node_rank for n in plan.nodes for _ in n.ranks))

    def until_done(self) -> RunReport:
        """Runs the attempt to its end, whatever that is; signals to this process stop it in good order."""
        bind.adopt_orphans()
        with _signals() as woken_by:
            self._listen(woken_by, lambda: self._on_signal(woken_by))
            for node_rank in self._channels:
                self._listen_to_agent(node_rank)
            self._record.enter("prepare", time.monotonic())
            for node in self._plan.nodes:
                self._channels[node.node_rank].send("prepare", plan=node.to_json())
            while self._state.phase != "done":
                self._turn()
        # Where an agent was killed its ranks died with it, and what those had started has come to this process.
        bind.end_orphans(keep={channel.pid for channel in self._channels.values()})
        self._selector.close()
        self._console.end_progress()
        return self._record.report(self._state.cause, time.monotonic())

    def _turn(self) -> None:
        wait = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
        ready = self._selector.select(wait)
        for key, _ in ready:
            key.data()
        if not ready and self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline = None
            self._happened(TimeUp())

    def _listen(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def _listen_to_agent(self, node_rank: int) -> None:
        self._listen(self._channels[node_rank].fileno(), lambda: self._on_agent(node_rank))

    def _happened(self, event: supervise.Event) -> None:
        self._state, actions = supervise.decide(self._state, event)
        for action in actions:
            self._perform(action)

    def _perform(self, action: supervise.Action) -> None:
        match action:
            case supervise.StartRanks():
                self._record.enter("start", time.monotonic())
                self._send_all("start")
            case supervise.SignalAll(signal=number):
                self._send_all("signal", number=number)
            case supervise.SetTimer(seconds=seconds):
                self._deadline = time.monotonic() + seconds

    def _send_all(self, command: str, **values: Any) -> None:
        for channel in self._channels.values():
            channel.send(command, **values)

    def _on_signal(self, woken_by: int) -> None:
        for number in os.read(woken_by, 64):
            self._console.say(f"{signal_name(number)}: stopping all ranks; once more to kill them at once")
            self._happened(Interrupted(signal=number))

    def _on_agent(self, node_rank: int) -> None:
        channel = self._channels[node_rank]
        try:
            for event in channel.receive():
                self._on_event(node_rank, event)
        except LaunchError as fault:
            self._happened(Faulted(node_rank=node_rank, text=str(fault)))
        if channel.ended:
            self._selector.unregister(channel.fileno())
            code = channel.close()
            how = signal_name(-code) if code is not None and code < 0 else f"exit code {code}"
            self._happened(Lost(node_rank=node_rank, text=f"{channel.host}: the agent is gone: {how}"))

    def _on_event(self, node_rank: int, event: dict[str, Any]) -> None:
        match event:
            case {"event": "output", "rank": rank, "lines": lines}:
                for line in lines:
                    self._console.say(output_line(rank, line))
            case {"event": "rank", "rank": rank, "data": data}:
                self._on_rank_event(rank, data)
            case {"event": "spawned", "rank": rank, "cpus": cpus}:
                self._check(rank, self._record.spawned(rank, cpus))
            case {"event": "exited", "rank": rank}:
                self._happened(Exited(rank=rank, ended=self._record.exited(rank, event)))
            case {"event": "prepared", "code": code, "signal": number}:
                self._record.prepare_tail = tuple(event.get("tail", ()))
                self._happened(Prepared(node_rank=node_rank, ended=Ended(code=code, signal=number)))
            case {"event": "note", "text": text}:
                self._record.note(text)
                self._console.say(f"note: {text}")
            case {"event": "fault", "text": text}:
                text = f"{self._channels[node_rank].host}: {text}"
                self._happened(Faulted(node_rank=node_rank, text=text))

    def _on_rank_event(self, rank: int, data: dict[str, Any]) -> None:
        if data.get("event") == "bound":
            self._check(rank, self._record.bound(rank, data))
        elif rank == 0:
            self._on_main_event(data)

    def _on_main_event(self, data: dict[str, Any]) -> None:
        match data:
            case {"event": "phase", "name": str(name)}:
                self._record.enter(name, time.monotonic())
            case {"event": "line", "text": text}:
                self._console.say(str(text))
            case {"event": "step", "step": int(step)}:
                self._record.last_step = step
                self._console.step(data)
            case {"event": "checkpoint", "path": path}:
                self._record.checkpoint = str(path)
            case {"event": "summary", "lines": list(lines)}:
                self._record.summary = tuple(map(str, lines))

    def _check(self, rank: int, difference: str | None) -> None:
        if difference is not None:
            self._happened(Mismatched(rank=rank, text=difference))


@contextmanager
def _signals() -> Iterator[int]:
    """A descriptor on which signals that ask the launcher to stop arrive by their numbers."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = {number: signal.signal(number, lambda *_: None) for number in STOPPING_SIGNALS}
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
