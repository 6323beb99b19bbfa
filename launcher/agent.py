"""The agent of one node: ``python -m launcher.agent``.

Commands come as JSON lines on standard input, events go as JSON lines to standard output:

    -> {"command": "open_doors"}                   <- {"event": "doors", "ports", "addresses", "token", ...}
    -> {"command": "knock", "doors", "token"}      <- {"event": "knocked", "reached", "addresses"}
    -> {"command": "survey", ...}                  <- {"event": "surveyed", ...}
    -> {"command": "open_store", "addr": A}        <- {"event": "store", "port": N, "courier_port": M}
    -> {"command": "prepare", "plan": NodePlan}    <- {"event": "prepared", "code" | "signal"}
    -> {"command": "start"}                        <- {"event": "spawned", "rank", "pid", "cpus"} for each rank
    -> {"command": "signal", "number": N}
    -> {"command": "ask", "request": "stacks"}     <- {"event": "stacks", "ranks": [{"rank", "state", "stacks"}]}
    -> {"command": "ask", "request": "save", "rank": R}
    -> {"command": "end_run", "file": F}           <- {"event": "ended_run", "text"}
    -> {"command": "clock" | "find_probe" | "examine" | "open_ring" | "ring", ...}  for falcon doctor, answered alike

besides ``hello`` at the start and ``output``, ``rank`` (a rank's own event), ``exited``, ``apart``, ``note``,
``fault`` and ``killed`` (by ``falcon kill``) when they happen. Both ends say ``alive`` every second. End of input,
or a launcher that is silent for too long, means: kill all that was started, and go. It has one thread: it forks.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NoReturn

from launcher import bind, hello, roster, stacks
from launcher.crew import Crew, reserve
from launcher.errors import LaunchError, UserError
from launcher.plan import RANK_EVENT_FD, RANK_STORE_FD, NodePlan
from launcher.wire import BEAT_S, HELD, SILENCE_S, Lines, Outbox

if TYPE_CHECKING:  # what a --dry-run never asks for is imported when it is asked for
    from launcher.doors import Doors

POLL_S: Final = 0.1
"""How often files of running children are looked at for new lines."""
LAST_WORDS_S: Final = 2.0
"""How long an agent that has nothing more to do waits for the launcher to take what it said."""
PATIENCE_S: Final = 60.0
"""How long a launcher may be silent before its first ``alive``."""


class Agent:
    """Runs one node's part of an attempt."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._commands = Lines(sys.stdin.fileno())
        self._outbox = Outbox(sys.stdout.fileno())
        self._crew = Crew(self)
        self._doors: Doors | None = None
        self._leaving = self._sending = False
        self._behind = False
        """Children have written more than was passed on."""
        self._lease_s = PATIENCE_S
        self._heard_at = self._said_at = time.monotonic()
        self._woken_by, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> None:
        """Answers commands until the input ends, then leaves nothing running."""
        self._take_signals()
        os.set_blocking(sys.stdin.fileno(), False)
        self.listen(sys.stdin.fileno(), self._on_command)
        self.listen(self._woken_by, self._on_wake)
        try:
            self.emit("hello", **hello.facts())
            while not self._leaving:
                self._turn()
        finally:
            self._crew.end_all()
            self._outbox.flush_within(LAST_WORDS_S)

    @property
    def unsent(self) -> int:
        """Bytes the launcher has not taken."""
        return self._outbox.waiting

    def listen(self, fd: int, callback: Callable[[], None]) -> None:
        """Calls back whenever ``fd`` is readable."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def forget(self, fd: int) -> None:
        """The inverse of listen."""
        self._selector.unregister(fd)

    def emit(self, event: str, **values: Any) -> None:
        """Tells the launcher."""
        self._said_at = time.monotonic()
        self._outbox.put({"event": event, **values})

    def _turn(self) -> None:
        idle_s = POLL_S if self._crew.busy else BEAT_S
        ready = self._selector.select(0.0 if self._behind else idle_s)
        # Nobody listens any more, or nobody can be heard: the same as the end of input. What came while a disk held
        # this process counts, although nobody has read it yet.
        silent = time.monotonic() - self._heard_at > self._lease_s
        self._leaving |= self._outbox.broken or (silent and sys.stdin.fileno() not in {key.fd for key, _ in ready})
        for key, _ in ready:
            key.data()
        self._behind = self._crew.tell_output()
        self._crew.tell_stacks()
        self._outbox.flush()
        self._watch_outbox()
        now = time.monotonic()
        if now - self._said_at >= BEAT_S:
            self.emit("alive", used_s=self._crew.used_s())

    def _watch_outbox(self) -> None:
        """What waits is sent as soon as there is room: a pipe takes 64 KB, and is emptied many times a second."""
        if self._sending != bool(self._outbox.waiting):
            self._sending = not self._sending
            if self._sending:
                self._selector.register(self._outbox, selectors.EVENT_WRITE, self._outbox.flush)
            else:
                self._selector.unregister(self._outbox)

    def _take_signals(self) -> None:
        # Handlers rather than SIG_IGN, which ranks would inherit; the wake-up descriptor tells what came.
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, roster.END_SIGNAL):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)

    def _on_command(self) -> None:
        self._heard_at = time.monotonic()  # be it by a part of a long command
        for line in self._commands.read():
            try:
                values = json.loads(line)
                self._obey(values.pop("command"), values)
            except (LaunchError, OSError, ValueError, KeyError) as fault:
                self.emit("fault", text=str(fault))
                self._leaving = True  # a node that cannot do its part has none
        self._leaving |= self._commands.ended

    def _on_wake(self) -> None:
        numbers = os.read(self._woken_by, 512)
        if roster.END_SIGNAL in numbers:
            self.emit("killed")
        self._leaving |= bool({signal.SIGTERM, signal.SIGHUP, roster.END_SIGNAL} & set(numbers))
        self._crew.reap()

    def _obey(self, command: str, values: dict[str, Any]) -> None:
        answers: dict[str, Callable[..., None]] = {
            "alive": self._renew_lease,
            "open_doors": self._open_doors,
            "open_store": self._open_store,
            "prepare": self._prepare,
            "start": self._crew.start_ranks,
            "signal": self._crew.signal_all,
            "ask": self._crew.ask,
            "knock": self._knock,
            "survey": self._survey,
            "end_run": lambda file: self.emit("ended_run", text=roster.end(file)),
            "clock": lambda: self.emit("clock", now=time.time()),
            "find_probe": self._find_probe,
            "examine": self._examine,
            "open_ring": lambda addr: self.emit("ring_opened", port=self._open("ring", addr)),
            "ring": self._ring,
        }
        if command not in answers:
            raise LaunchError(f'unknown command: "{command}"')
        answers[command](**values)

    def _renew_lease(self) -> None:
        self._lease_s = SILENCE_S

    def _prepare(self, plan: dict[str, Any]) -> None:
        taken = NodePlan.from_json(plan)
        roster.sign(taken)  # first: by it the launcher sees whether the run folder is shared
        self._crew.prepare(taken)

    def _survey(self, **asked: Any) -> None:
        from launcher import survey

        self.emit("surveyed", **survey.take(**asked))

    def _ring(self, **to: Any) -> None:
        from launcher import examine

        self.emit("ringed", **examine.ring(self._crew.sockets.pop("ring"), **to))

    def _find_probe(self, cache: dict[str, str]) -> None:
        from launcher import probe

        self.emit("probe_found", **probe.find(cache))

    def _examine(self, **asked: Any) -> None:
        from launcher import examine

        store = self._crew.sockets.pop("store", None)
        self.emit("examined", **examine.host(**asked, listening=store))
        if store is not None:
            store.close()

    def _knock(self, **asked: Any) -> None:
        from launcher import doors

        self.emit("knocked", reached=doors.knock(**asked), addresses=doors.addresses())

    def _open_doors(self) -> None:
        from launcher import doors

        self._doors = doors.Doors()
        for fd, answer in self._doors.answers():
            self.listen(fd, answer)
        self.emit("doors", **self._doors.facts())

    def _open_store(self, addr: str, *, courier: bool) -> None:
        from launcher import doors

        if self._doors is not None:
            for fd, _ in self._doors.answers():
                self.forget(fd)
            self._doors.close()
        doors.check_own(addr)
        ports = {name: self._open(name, addr) for name in ("store", *(("courier",) if courier else ()))}
        self.emit("store", port=ports["store"], courier_port=ports.get("courier"))

    def _open(self, name: str, addr: str) -> int:
        family = socket.AF_INET6 if ":" in addr else socket.AF_INET
        listening = self._crew.sockets[name] = socket.socket(family, socket.SOCK_STREAM)
        listening.bind((addr, 0))  # this address only, and a port the kernel picks: nobody can take it in between
        listening.listen(1024)
        return int(listening.getsockname()[1])


def keep(agent: int) -> None:
    """Waits for the agent, ends whatever it could not end itself, and ends as it did."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda got, _: os.kill(agent, got))
    _speak_for(agent)
    _, status = os.waitpid(agent, 0)
    bind.end_orphans()
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        told = json.dumps({"event": "died", "signal": -code})
        _say_last(f"\n{told}\n".encode())  # its last line may lack an end
    leave(code if code >= 0 else 128 - code)


def _say_last(words: bytes) -> None:
    """The agent has made the pipe one that never waits, and may have left it full."""
    room = select.poll()
    room.register(sys.stdout.fileno(), select.POLLOUT)
    if room.poll(LAST_WORDS_S * 1000):
        with contextlib.suppress(OSError):
            os.write(sys.stdout.fileno(), words)


def _speak_for(agent: int) -> None:
    """Until it ends. While the kernel holds it in a read that cannot be interrupted, it is alive and cannot say so."""
    ended = select.poll()
    ended.register(os.pidfd_open(agent), select.POLLIN)
    while not ended.poll(BEAT_S * 1000):
        if stacks.is_held(agent):
            with contextlib.suppress(OSError):
                os.write(sys.stdout.fileno(), HELD)


def leave(code: int) -> NoReturn:
    """Ends this process without the interpreter's own clearing up, which somebody would have to wait for."""
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Serves the launcher at the other end of standard input and output."""
    for number in (RANK_EVENT_FD, RANK_STORE_FD):
        reserve(number)
    bind.adopt_orphans()
    keeper = os.getpid()
    # Two processes: whichever is killed, the other one ends what was started.
    if agent := os.fork():
        keep(agent)
    bind.adopt_orphans()
    bind.die_with(keeper, signal.SIGTERM)
    try:
        Agent().serve()
    except UserError as fault:
        sys.stderr.write(f"launcher.agent: {fault}\n")
        leave(1)
    leave(0)


if __name__ == "__main__":
    main()
