"""What is to be done when something happens: decide(state, event) -> (state, actions). Pure.

preparing --all nodes prepared--> running --all ranks ended--> done
    |                                |
    +------ a first cause -----------+--> stopping --grace over--> killing --all ended--> done
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Final, Literal

from falcon_dist.contract import EXIT_FAILED

FAILURE_GRACE_S: Final = 3.0
"""How long ranks may take to end after one of them failed."""
INTERRUPT_GRACE_S: Final = 5.0
"""How long they may take when the user asks them to stop."""
KILL_GRACE_S: Final = 1.5
"""How long an agent may take to tell that killed ranks are gone, before its channel is closed."""
SIGTERM: Final = 15
SIGKILL: Final = 9

Phase = Literal["preparing", "running", "stopping", "killing", "done"]
Kind = Literal["rank", "prepare", "binding", "agent", "interrupt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """The first thing that ended the run before its time."""

    kind: Kind
    exit_code: int
    """The launcher's own exit code because of it."""
    rank: int | None = None
    node_rank: int | None = None
    text: str = ""
    echo: bool = False
    """Likely the answer to a failure elsewhere, of which nothing was heard yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What is known to be alive, and how far the run is."""

    phase: Phase
    nodes_of: tuple[int, ...]
    """node_rank of each rank."""
    preparing: frozenset[int] = frozenset()
    """Nodes whose preparation has not ended."""
    alive: frozenset[int] = frozenset()
    """Ranks that were started and have not ended."""
    cause: Cause | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a process ended: exactly one of the two is set."""

    code: int | None = None
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """As a shell counts: 128 + n for signal n."""
        return 128 + self.signal if self.signal is not None else self.code or 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A node's preparation ended."""

    node_rank: int
    ended: Ended
    text: str = ""
    """Where, if there is more than one node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exited:
    """A rank ended."""

    rank: int
    ended: Ended
    echo: bool = False
    """Its last words are of a peer or a connection that is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatched:
    """A rank does not run where it was planned to."""

    rank: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Faulted:
    """An agent could not do what it was told."""

    node_rank: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """An agent is gone, and its ranks with it."""

    node_rank: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Interrupted:
    """The launcher got a signal that asks it to end."""

    signal: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeUp:
    """The time set by the last SetTimer is over."""


Event = Prepared | Exited | Mismatched | Faulted | Lost | Interrupted | TimeUp


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRanks:
    """Tell every agent to start its ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalAll:
    """Tell every agent to send this signal to what it runs."""

    signal: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SetTimer:
    """Send TimeUp after so many seconds."""

    seconds: float


Action = StartRanks | SignalAll | SetTimer
Decision = tuple[RunState, tuple[Action, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stop:
    """A reason to stop, with the time ranks get for it."""

    cause: Cause
    grace_s: float = field(default=FAILURE_GRACE_S)


def begin(nodes_of: tuple[int, ...]) -> RunState:
    """The first state of an attempt whose ranks sit on ``nodes_of``: every node has been told to prepare."""
    return RunState(phase="preparing", nodes_of=nodes_of, preparing=frozenset(nodes_of))


def decide(state: RunState, event: Event) -> Decision:
    """The next state and what has to be done to get there."""
    match event:
        case Prepared():
            return _prepared(state, event)
        case Interrupted(signal=signal):
            return _interrupted(state, signal)
        case TimeUp():
            return _time_up(state)
        case _:
            return _settle(_without(state, event), _reason(state, event))


def _without(state: RunState, event: Exited | Mismatched | Faulted | Lost) -> RunState:
    """The state without what the event says is gone."""
    match event:
        case Exited(rank=rank):
            return dataclasses.replace(state, alive=state.alive - {rank})
        case Lost(node_rank=node):
            gone = frozenset(r for r in state.alive if state.nodes_of[r] == node)
            return dataclasses.replace(state, alive=state.alive - gone, preparing=state.preparing - {node})
        case _:
            return state


def _reason(state: RunState, event: Exited | Mismatched | Faulted | Lost) -> _Stop | None:
    """Why the event ends the run, or None."""
    match event:
        case Exited(rank=rank, ended=ended, echo=echo):
            node = state.nodes_of[rank]
            cause = Cause(kind="rank", rank=rank, node_rank=node, exit_code=ended.exit_code, echo=echo)
            return _Stop(cause=cause) if ended.exit_code else None
        case Mismatched(rank=rank, text=text):
            node = state.nodes_of[rank]
            return _Stop(cause=Cause(kind="binding", rank=rank, node_rank=node, exit_code=EXIT_FAILED, text=text))
        case Faulted(node_rank=node, text=text) | Lost(node_rank=node, text=text):
            return _Stop(cause=Cause(kind="agent", node_rank=node, exit_code=EXIT_FAILED, text=text))


def _prepared(state: RunState, event: Prepared) -> Decision:
    node, code = event.node_rank, event.ended.exit_code
    state = dataclasses.replace(state, preparing=state.preparing - {node})
    if code:
        return _settle(state, _Stop(cause=Cause(kind="prepare", node_rank=node, exit_code=code, text=event.text)))
    if state.phase == "preparing" and not state.preparing:
        return _start(state)
    return _settle(state, None)


def _start(state: RunState) -> Decision:
    return dataclasses.replace(state, phase="running", alive=frozenset(range(len(state.nodes_of)))), (StartRanks(),)


def _settle(state: RunState, stop: _Stop | None) -> Decision:
    """Begins to stop if there is a reason and it is the first; ends the run when nothing is left."""
    first = stop is not None and state.cause is None and state.phase in ("preparing", "running")
    if stop is not None and (first or _is_behind(state, stop.cause)):
        state = dataclasses.replace(state, cause=stop.cause)
    if not state.alive and not state.preparing:
        return dataclasses.replace(state, phase="done"), ()
    if stop is not None and first:
        state = dataclasses.replace(state, phase="stopping")
        return state, (SignalAll(signal=SIGTERM), SetTimer(seconds=stop.grace_s))
    return state, ()


def _is_behind(state: RunState, cause: Cause) -> bool:
    """Whether it is what the first cause was only the echo of: peers of a dead rank may be heard before its agent."""
    echo = state.cause is not None and state.cause.echo and state.phase == "stopping"
    ours = cause.exit_code == 128 + SIGTERM  # what ranks die of when they are told to stop
    return echo and not cause.echo and not ours


def _interrupted(state: RunState, signal: int) -> Decision:
    if state.phase in ("stopping", "killing"):  # asked twice, or in a hurry
        return _kill(state)
    cause = Cause(kind="interrupt", exit_code=128 + signal)
    return _settle(state, _Stop(cause=cause, grace_s=INTERRUPT_GRACE_S))


def _time_up(state: RunState) -> Decision:
    if state.phase == "stopping":
        return _kill(state)
    if state.phase == "killing":  # an agent that does not answer: its end of stream is the last word
        return dataclasses.replace(state, phase="done"), ()
    return state, ()


def _kill(state: RunState) -> Decision:
    return dataclasses.replace(state, phase="killing"), (SignalAll(signal=SIGKILL), SetTimer(seconds=KILL_GRACE_S))
