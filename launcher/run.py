"""The only loop of a launcher: events of the agents -> decide -> actions -> RunReport."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Final

from falcon_dist.contract import STACKS_FILE
from launcher import bind, render, silence, supervise
from launcher.console import Console
from launcher.discover import Agents
from launcher.errors import LaunchError
from launcher.events import (
    Action,
    AskSave,
    AskStacks,
    AskStop,
    CanSave,
    CanStop,
    Ended,
    Event,
    Exited,
    Faulted,
    Interrupted,
    Lost,
    Mismatched,
    Prepared,
    Saved,
    SetTimer,
    SignalAll,
    Stalled,
    StartRanks,
    TimeUp,
)
from launcher.interrupts import meaning, stopping_signals
from launcher.mirror import Mirror
from launcher.patience import Patience
from launcher.plan import LaunchPlan
from launcher.record import Record
from launcher.report import RunReport
from launcher.standing import Stand, accuse
from launcher.straggler import Paces
from launcher.watch import Watch
from launcher.wire import BEAT_S

CLOSE_S: Final = 2.0
"""How long the way to an agent that has ended may take to close."""


class Run:
    """One attempt in progress."""

    def __init__(
        self, plan: LaunchPlan, agents: Agents, console: Console, record: Record, patience: Patience | None = None
    ) -> None:
        patience = patience or Patience()
        self._plan = plan
        self._channels = dict(enumerate(agents.channels))
        self._living = dict(self._channels)
        self._console = console
        self._record = record
        self._mirror = Mirror(record, self._note)
        self._deadline: float | None = None
        self._beat_at = 0.0
        self._flushing: set[int] = set()
        self._held: set[int] = set()
        self._selector = selectors.DefaultSelector()
        self._watch = Watch(patience.hang_s)
        self._stands: dict[int, Stand] = {}
        self._paces = Paces({rank.rank: node.host for node in plan.nodes for rank in node.ranks})
        seats = tuple(n.node_rank for n in plan.nodes for _ in n.ranks)
        self._state = supervise.begin(seats, patience)

    def until_done(self) -> RunReport:
        """Runs the attempt to its end, whatever that is; signals to this process stop it in good order."""
        bind.adopt_orphans()
        with stopping_signals() as woken_by:
            self._listen(woken_by, lambda: self._on_signal(woken_by))
            for node_rank, channel in self._channels.items():
                channel.heard_at = time.monotonic()
                self._listen(channel.fileno(), partial(self._on_agent, node_rank))
            self._record.enter("prepare", time.monotonic())
            for node in self._plan.nodes:
                self._channels[node.node_rank].send("prepare", plan=node.to_json())
            while self._state.phase != "done":
                self._turn()
        # Where an agent was killed its ranks died with it, and what those had started has come to this process.
        held = bind.end_orphans(keep={channel.pid for channel in self._channels.values()})
        for pid in held:
            self._console.complain(f"process {pid} cannot be ended: the kernel holds it, as where a disk stands still")
        self._selector.close()
        self._console.end_progress()
        self._record.step_s = self._watch.median_s
        state, now = self._state, time.monotonic()
        asked = {"interrupted": state.interrupted, "asked_to_yield": state.asked_to_yield}
        return self._record.report(state.cause, now, **asked)

    def _turn(self) -> None:
        self._beat()
        self._watch_outboxes()
        now = time.monotonic()
        until = min(self._beat_at, self._deadline or self._beat_at)
        ready = self._selector.select(max(0.0, until - now))
        self._look_for_silence({key.fd for key, _ in ready})
        for key, _ in ready:
            key.data()
        if text := self._watch.overdue(time.monotonic(), preparing=self._state.phase == "preparing"):
            self._happened(Stalled(text=text))
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline = None
            self._happened(accuse(self._stands) if self._state.phase == "tracing" else TimeUp())

    def _beat(self) -> None:
        """Tells every agent that this launcher lives; an agent that hears nothing ends its ranks."""
        if time.monotonic() >= self._beat_at:
            self._beat_at = time.monotonic() + BEAT_S
            self._send_all("alive")

    def _watch_outboxes(self) -> None:
        waiting = {c.outbox.fileno(): c.outbox for c in self._living.values() if c.outbox.waiting}
        for fd in self._flushing - set(waiting):
            self._selector.unregister(fd)
        for fd in set(waiting) - self._flushing:
            self._selector.register(fd, selectors.EVENT_WRITE, waiting[fd].flush)
        self._flushing = set(waiting)

    def _look_for_silence(self, ready: Collection[int]) -> None:
        running = self._state.phase in ("preparing", "running", "yielding")
        dead = silence.silent(self._living, ready, time.monotonic(), running=running)
        for node_rank in dead.node_ranks:
            self._lose(node_rank, dead.text, patience_s=0.0, blamed=dead.blamed)
        for node_rank, text in silence.held(self._living).items():
            if node_rank not in self._held:
                self._held.add(node_rank)
                self._note(text)

    def _listen(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def _happened(self, event: Event) -> None:
        before = self._state.cause
        self._state, actions = supervise.decide(self._state, event)
        if self._state.cause != before:
            self._tell_cause()
        for action in actions:
            self._perform(action)

    def _tell_cause(self) -> None:
        """Says at once what is wrong; the evidence follows when all have ended, which a checkpoint may delay."""
        told = render.failure_text(self._record.report(self._state.cause, time.monotonic()))
        if self._state.cause and self._state.cause.kind not in ("interrupt", "yield"):
            self._console.say(f"noticed: {told.splitlines()[0]}")

    def _perform(self, action: Action) -> None:
        match action:
            case StartRanks():
                self._record.enter("start", time.monotonic())
                self._send_all("start")
            case SignalAll(signal=number):
                self._record.enter("stop", time.monotonic())
                self._send_all("signal", number=number)
            case AskStacks():
                self._send_all("ask", request="stacks")
            case AskSave(rank=rank):
                self._record.enter("emergency save", time.monotonic())
                self._console.say(f"rank {rank} is asked to save the last finished step")
                self._channels[self._state.nodes_of[rank]].send("ask", request="save", rank=rank)
            case AskStop():
                self._channels[self._state.nodes_of[0]].send("ask", request="stop", rank=0)
            case SetTimer(seconds=seconds):
                self._deadline = time.monotonic() + seconds

    def _send_all(self, command: str, **values: Any) -> None:
        for channel in self._living.values():
            channel.send(command, **values)

    def _on_signal(self, woken_by: int) -> None:
        for number in os.read(woken_by, 64):
            event, text = meaning(number)
            self._console.say(text)
            if event is not None:
                self._happened(event)

    def _on_agent(self, node_rank: int) -> None:
        channel = self._channels[node_rank]
        if node_rank not in self._living:  # lost a moment ago
            return
        try:
            for event in channel.receive():
                self._watch.heard(node_rank, event.get("used_s"), time.monotonic())
                self._on_event(node_rank, event)
        except LaunchError as fault:
            self._happened(Faulted(node_rank=node_rank, text=str(fault)))
        if channel.ended:
            self._lose(node_rank, f"{channel.host}: the agent is gone", patience_s=CLOSE_S)

    def _lose(self, node_rank: int, text: str, *, patience_s: float, blamed: bool = True) -> None:
        channel = self._living.pop(node_rank)
        self._selector.unregister(channel.fileno())
        self._watch_outboxes()
        code = channel.close(patience_s)
        told = f": {channel.how_ended(code)}" if patience_s else ""
        self._happened(Lost(node_rank=node_rank, text=text + told, blamed=blamed))

    def _on_event(self, node_rank: int, event: dict[str, Any]) -> None:
        match event:
            case {"event": "output", "task": task, "rank": rank, "stream": stream, "lines": lines}:
                self._on_output(node_rank, task, rank, stream, lines)
            case {"event": "rank", "rank": rank, "data": data}:
                self._on_rank_event(rank, data)
            case {"event": "spawned", "rank": rank, "cpus": cpus}:
                self._check(rank, self._record.spawned(rank, cpus))
            case {"event": "exited", "rank": rank}:
                self._on_exit(node_rank, rank, event)
            case {"event": "prepared"}:
                self._on_prepared(node_rank, event)
            case {"event": "apart"}:
                self._mirror.told_apart(self._plan.nodes[node_rank])
            case {"event": "stacks", "ranks": list(ranks)}:
                self._on_stacks(node_rank, ranks)
            case _:
                self._on_word(node_rank, event)

    def _on_word(self, node_rank: int, event: dict[str, Any]) -> None:
        match event:
            case {"event": "note", "text": text}:
                self._note(text, node_rank)
            case {"event": "killed"} if not self._state.interrupted:  # further agents tell the same
                self._happened(Interrupted(signal=signal.SIGTERM))
            case {"event": "fault", "text": text}:
                self._happened(Faulted(node_rank=node_rank, text=f"{self._channels[node_rank].host}: {text}"))

    def _note(self, text: str, node_rank: int | None = None) -> None:
        if node_rank is not None and len(self._channels) > 1:
            text = f"{self._channels[node_rank].host}: {text}"
        self._record.note(text)
        self._console.say(f"note: {text}", always=True)

    def _on_output(self, node_rank: int, task: str, rank: int | None, stream: str, lines: list[str]) -> None:
        if task == "rank" and rank is not None:
            self._mirror.append(node_rank, rank, stream, lines)
        if rank is None and node_rank and stream == "stderr":
            return  # told once more if it fails
        self._console.say("\n".join(render.output_line(rank, line) for line in lines))

    def _on_exit(self, node_rank: int, rank: int, event: dict[str, Any]) -> None:
        self._mirror.keep(node_rank, rank, event["files"])
        self._watch.ended(rank, time.monotonic())
        ended = self._record.exited(rank, event)
        self._happened(Exited(rank=rank, ended=ended, echo=self._record.is_echo(rank)))

    def _on_prepared(self, node_rank: int, event: dict[str, Any]) -> None:
        ended = Ended(code=event["code"], signal=event["signal"])
        told = {"echo": self._record.prepared(ended, tuple(event.get("tail", ())))}
        told |= {"oom_kills": event.get("oom_kills", 0)}
        where = self._channels[node_rank].host if len(self._channels) > 1 else ""
        self._happened(Prepared(node_rank=node_rank, ended=ended, text=where, **told))

    def _on_stacks(self, node_rank: int, ranks: list[dict[str, str]]) -> None:
        host = self._channels[node_rank].host
        for told in ranks:
            rank = int(told["rank"])
            step = self._record.last_step_of(rank)
            self._stands[rank] = Stand(rank=rank, host=host, last_step=step, state=told["state"], stacks=told["stacks"])
            self._mirror.keep(node_rank, rank, {STACKS_FILE: told["stacks"]} if told["stacks"] else {})
        if self._state.alive <= set(self._stands):
            self._happened(accuse(self._stands))

    def _on_rank_event(self, rank: int, data: dict[str, Any]) -> None:
        match data:
            case {"event": "bound"}:
                self._check(rank, self._record.bound(rank, data))
            case {"event": "phase", "name": str(name)}:
                self._watch.entered(rank, name, time.monotonic())
            case {"event": "step", "step": int(step)}:
                self._watch.stepped(rank, time.monotonic())
                self._record.stepped(rank, step)
                if text := self._paces.stepped(rank, data):
                    self._note(text)
            case {"event": "takes", "signal": "save"} if self._record.is_found_again(self._state.nodes_of[rank]):
                self._happened(CanSave(rank=rank))
            case {"event": "takes", "signal": "stop"} if rank == 0:  # which is the one that is asked
                self._happened(CanStop())
            case {"event": "checkpoint", "path": path, "step": int(step)}:
                self._record.committed(str(path), step)
                if data.get("emergency"):
                    self._happened(Saved(rank=rank))
        if rank == 0:
            self._record.main_told(data, time.monotonic())
            self._console.main_told(data)

    def _check(self, rank: int, difference: str | None) -> None:
        if difference is not None:
            self._happened(Mismatched(rank=rank, text=difference))
