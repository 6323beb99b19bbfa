"""What is to be done when something happens: decide(state, event) -> (state, actions). Pure.

preparing --all nodes prepared--> running --all ranks ended--> done
    |                                |  \\--no step for too long--> tracing --stacks kept--.
    |                                |                                                    |
    |                                +--a first cause, and a rank that can save--> saving <+
    |                                |                                               |
    +---------- a first cause -------+--> stopping <--committed, or its grace over---+
                                             |
                                             +--grace over--> killing --all ended--> done

running --asked to make way--> yielding --all ranks ended after the agreed step--> done; its grace over--> saving
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final, Literal

from falcon_dist.contract import EMERGENCY_GRACE_S, EXIT_FAILED, EXIT_STOPPED, NOT_RETRIED
from launcher.events import (
    Action,
    AskSave,
    AskStacks,
    AskStop,
    CanSave,
    CanStop,
    Cause,
    Event,
    Exited,
    Faulted,
    Interrupted,
    Lost,
    MakeWay,
    Mismatched,
    Prepared,
    Saved,
    SetTimer,
    SignalAll,
    Stalled,
    StartRanks,
    TimeUp,
    Traced,
)
from launcher.patience import STOP_GRACE_S, Patience

FAILURE_GRACE_S: Final = 3.0
"""How long ranks may take to end after one of them failed."""
INTERRUPT_GRACE_S: Final = 5.0
"""How long they may take when the user asks them to stop."""
KILL_GRACE_S: Final = 1.5
"""How long an agent may take to tell that killed ranks are gone, before its channel is closed."""
TRACE_S: Final = 5.0
"""How long ranks may take to write their stacks."""
SIGTERM: Final = 15
SIGKILL: Final = 9

Phase = Literal["preparing", "running", "yielding", "tracing", "saving", "stopping", "killing", "done"]
Decision = tuple["RunState", tuple[Action, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What is known to be alive, and how far the run is."""

    phase: Phase
    nodes_of: tuple[int, ...]
    """node_rank of each rank."""
    save_grace_s: float = EMERGENCY_GRACE_S
    """How long an emergency checkpoint may take; 0: none is asked for."""
    preparing: frozenset[int] = frozenset()
    """Nodes whose preparation has not ended."""
    alive: frozenset[int] = frozenset()
    """Ranks that were started and have not ended."""
    can_save: frozenset[int] = frozenset()
    """Ranks that said they can write an emergency checkpoint."""
    can_stop: bool = False
    """They can be asked to end after the step they are in."""
    stop_grace_s: float = STOP_GRACE_S
    """How long that may take."""
    writer: int | None = None
    """The one that was asked to."""
    cause: Cause | None = None
    interrupted: bool = False
    """A signal asked the launcher to end, be it after the first cause."""
    asked_to_yield: bool = False
    """A signal asked it to make way, be it after the first cause or before what became of it."""


def begin(nodes_of: tuple[int, ...], patience: Patience | None = None) -> RunState:
    """The first state of an attempt whose ranks sit on ``nodes_of``: every node has been told to prepare."""
    patience = patience or Patience()
    return RunState(
        phase="preparing",
        nodes_of=nodes_of,
        save_grace_s=patience.emergency_grace_s,
        stop_grace_s=patience.stop_grace_s,
        preparing=frozenset(nodes_of),
    )


def decide(state: RunState, event: Event) -> Decision:
    """The next state and what has to be done to get there."""
    match event:
        case Prepared():
            decision = _prepared(state, event)
        case Interrupted(signal=signal):
            decision = _interrupted(state, signal)
        case TimeUp():
            decision = _time_up(state)
        case CanSave() | CanStop():
            decision = _able(state, event), ()
        case Saved(rank=rank):
            decision = _stop(state) if (state.phase, state.writer) == ("saving", rank) else (state, ())
        case MakeWay():
            decision = _make_way(state)
        case Exited(ended=ended) if state.phase == "yielding" and ended.exit_code in (0, EXIT_STOPPED):
            decision = _yielded(_without(state, event), ended.exit_code)
        case Stalled(text=text):
            decision = _stalled(state, text)
        case Traced():
            decision = _traced(state, event)
        case _:
            decision = _settle(_without(state, event), _cause(state, event))
    return decision


def _able(state: RunState, event: CanSave | CanStop) -> RunState:
    """The state with what a rank said it can do."""
    if isinstance(event, CanSave):
        return dataclasses.replace(state, can_save=state.can_save | {event.rank})
    return dataclasses.replace(state, can_stop=True)


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


def _cause(state: RunState, event: Exited | Mismatched | Faulted | Lost) -> Cause | None:
    """Why the event ends the run, or None."""
    match event:
        case Exited(rank=rank, ended=ended, echo=echo):
            node, code = state.nodes_of[rank], ended.exit_code
            return Cause(kind="rank", rank=rank, node_rank=node, exit_code=code, echo=echo) if code else None
        case Mismatched(rank=rank, text=text):
            node = state.nodes_of[rank]
            return Cause(kind="binding", rank=rank, node_rank=node, exit_code=EXIT_FAILED, text=text)
        case Faulted(node_rank=node, text=text):
            return Cause(kind="agent", node_rank=node, exit_code=EXIT_FAILED, text=text)
        case Lost(node_rank=node, text=text):
            return Cause(kind="lost", node_rank=node if event.blamed else None, exit_code=EXIT_FAILED, text=text)


def _prepared(state: RunState, event: Prepared) -> Decision:
    node, code = event.node_rank, event.ended.exit_code
    state = dataclasses.replace(state, preparing=state.preparing - {node})
    if code:
        where, killed = event.text, event.oom_kills
        cause = Cause(kind="prepare", node_rank=node, exit_code=code, text=where, echo=event.echo, oom_kills=killed)
        return _settle(state, cause)
    if state.phase == "preparing" and not state.preparing:
        return dataclasses.replace(state, phase="running", alive=frozenset(range(len(state.nodes_of)))), (StartRanks(),)
    return _settle(state, None)


def _settle(state: RunState, cause: Cause | None) -> Decision:
    """Begins to stop if there is a cause and it is the first; ends the run when nothing is left."""
    if cause is not None and state.phase == "yielding":  # what goes wrong on the way out is a failure like any other
        state = dataclasses.replace(state, phase="running", cause=None)
    first = cause is not None and state.cause is None and state.phase in ("preparing", "running")
    if cause is not None and (first or _is_behind(state, cause)):
        state = dataclasses.replace(state, cause=cause)
    if not state.alive and not state.preparing:
        return dataclasses.replace(state, phase="done"), ()
    if first:
        return _save(state)
    if state.phase == "saving" and state.writer not in state.alive:
        return _save(state)  # another one may do it
    return state, ()


def _is_behind(state: RunState, cause: Cause) -> bool:
    """Whether it is what the first cause was only the echo of: peers of what died may be heard before its agent."""
    echo = state.cause is not None and state.cause.echo and state.phase in ("saving", "stopping")
    ours = cause.exit_code == 128 + SIGTERM  # what ranks die of when they are told to stop
    return echo and not cause.echo and not ours


def _save(state: RunState) -> Decision:
    """A survivor writes down the last finished step, where the cause leaves one to be trusted; else all stop."""
    hung = state.cause.rank if state.cause else None
    able = sorted((state.alive & state.can_save) - {hung})
    if not able or not _is_worth_saving(state):
        return _stop(state)
    state = dataclasses.replace(state, phase="saving", writer=able[0])
    return state, (AskSave(rank=able[0]), SetTimer(seconds=state.save_grace_s))


def _is_worth_saving(state: RunState) -> bool:
    cause = state.cause
    if cause is None or not state.save_grace_s:
        return False
    return cause.kind in ("lost", "hang", "yield") or (cause.kind == "rank" and cause.exit_code not in NOT_RETRIED)


def _stop(state: RunState) -> Decision:
    asked = state.cause is not None and state.cause.kind == "interrupt"
    grace_s = INTERRUPT_GRACE_S if asked else FAILURE_GRACE_S
    return dataclasses.replace(state, phase="stopping"), (SignalAll(signal=SIGTERM), SetTimer(seconds=grace_s))


def _stalled(state: RunState, text: str) -> Decision:
    cause = Cause(kind="hang", exit_code=EXIT_FAILED, text=text)
    if state.phase == "preparing":
        return _settle(state, cause)
    if state.phase != "running":
        return state, ()
    return dataclasses.replace(state, phase="tracing", cause=cause), (AskStacks(), SetTimer(seconds=TRACE_S))


def _make_way(state: RunState) -> Decision:
    """Ranks that can be asked end after their step; others get the signal that programs expect, and as much time."""
    state = dataclasses.replace(state, asked_to_yield=True)
    if state.phase not in ("preparing", "running"):
        return state, ()
    cause = Cause(kind="yield", exit_code=EXIT_STOPPED, text="asked to make way")
    if state.phase == "preparing":
        return _settle(state, cause)
    timer = SetTimer(seconds=state.stop_grace_s)
    if state.can_stop:
        return dataclasses.replace(state, phase="yielding", cause=cause), (AskStop(), timer)
    return dataclasses.replace(state, phase="stopping", cause=cause), (SignalAll(signal=SIGTERM), timer)


def _yielded(state: RunState, code: int) -> Decision:
    """A rank has ended, after the agreed step or, with code 0, because the whole run was done before."""
    if not code:
        state = dataclasses.replace(state, phase="running", cause=None)
    return (state, ()) if state.alive else (dataclasses.replace(state, phase="done"), ())


def _traced(state: RunState, event: Traced) -> Decision:
    if state.phase != "tracing" or state.cause is None:
        return state, ()
    node = None if event.rank is None else state.nodes_of[event.rank]
    text = "; ".join(part for part in (state.cause.text, event.text) if part)
    cause = dataclasses.replace(state.cause, rank=event.rank, node_rank=node, text=text)
    return _save(dataclasses.replace(state, cause=cause))


def _interrupted(state: RunState, signal: int) -> Decision:
    state = dataclasses.replace(state, interrupted=True)
    cause = Cause(kind="interrupt", exit_code=128 + signal)
    if state.cause is not None and state.cause.kind == "yield":  # who is to end must not be started again
        state = dataclasses.replace(state, cause=cause)
        if state.phase == "done":
            return state, ()
        return _kill(state) if state.phase == "killing" else _stop(state)
    if state.phase in ("stopping", "killing"):  # asked twice, or in a hurry
        return _kill(state)
    return _stop(state) if state.phase in ("tracing", "saving") else _settle(state, cause)


def _time_up(state: RunState) -> Decision:
    match state.phase:
        case "tracing" | "yielding":  # the step that was to be the last one takes too long; the one before is there
            return _save(state)
        case "saving":
            return _stop(state)
        case "stopping":
            return _kill(state)
        case "killing":  # an agent that does not answer: its end of stream is the last word
            return dataclasses.replace(state, phase="done"), ()
        case _:
            return state, ()


def _kill(state: RunState) -> Decision:
    return dataclasses.replace(state, phase="killing"), (SignalAll(signal=SIGKILL), SetTimer(seconds=KILL_GRACE_S))
