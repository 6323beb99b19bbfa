"""Whether a run that ended before its time is started again, when, and on which hosts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from falcon_dist.contract import EXIT_UNSOUND, EXIT_USER_ERROR
from launcher.events import Cause

MOST_IN_VAIN: Final = 3
"""Restarts without a new checkpoint after which no further one is made."""
FAULTS_OF_A_HOST: Final = 2
"""A host that failed so often is left out, where enough others are left."""
FIRST_DELAY_S: Final = 1.0
SIGILL: Final = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What the user allows."""

    max_restarts: int = 0
    min_nodes: int | None = None
    """The run may go on with so many hosts; None: with all of them only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """One attempt that is over."""

    cause: Cause | None
    """None: it ended well."""
    hosts: tuple[str, ...]
    """Hosts it ran on."""
    failed_hosts: tuple[str, ...] = ()
    """The hosts at fault: lost, or unable to do their part, or a rank there died of a signal."""
    checkpoint_step: int = 0
    """Step of the run's newest checkpoint when it ended."""
    out_of_memory: bool = False
    interrupted: bool = False
    """The launcher was asked to end, be it after the first failure."""
    asked_to_yield: bool = False
    """It was asked to make way, be it after the first failure or before it."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """How many ran on each host."""
    micro_batches: int | None = None
    """Of all ranks in a step, which hosts that are left have to share out evenly; None: nothing is to be shared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """No further attempt."""

    why: str = ""
    """For a person; empty: nothing was to be decided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Again:
    """A further attempt."""

    delay_s: float
    hosts: tuple[str, ...]
    without: tuple[str, ...] = ()
    """Hosts that are left out from now on."""
    spare: tuple[str, ...] = ()
    """Those of them that did not fail, but among which a step's rows cannot be divided."""


def after(past: Sequence[Past], policy: Policy) -> Stop | Again:
    """What follows the last of these attempts."""
    last = past[-1]
    if last.cause is None or last.cause.kind in ("interrupt", "yield") or not policy.max_restarts:
        return Stop()
    if last.interrupted:
        return Stop(why="not started again: it was interrupted")
    if refusal := _refusal(last, last.cause):
        return Stop(why=f"not started again: {refusal}")
    if len(past) > policy.max_restarts:
        return Stop(why=f"not started again: {policy.max_restarts} restarts were allowed (--max-restarts)")
    in_vain = _restarts_in_vain(past)
    if in_vain >= MOST_IN_VAIN:
        return Stop(why=f"not started again: {in_vain} restarts in a row brought no new checkpoint")
    hosts = _hosts(past, policy)
    without = tuple(h for h in last.hosts if h not in hosts)
    spare = tuple(h for h in without if not _failed_too_often(h, past))
    return Again(delay_s=FIRST_DELAY_S * 2**in_vain, hosts=hosts, without=without, spare=spare)


def _refusal(last: Past, cause: Cause) -> str | None:
    """Why the very same start would end the same way, or is not for this launcher to make; or None."""
    if last.out_of_memory:
        return "it would run out of memory again; lower loop.micro_batch or data.max_length, or use more hosts"
    if cause.kind == "binding":
        return "it would be bound otherwise than planned again"
    if cause.exit_code == EXIT_USER_ERROR and cause.kind in ("rank", "prepare", "start"):
        return "what was given cannot be used"
    if cause.kind == "rank" and cause.exit_code == EXIT_UNSOUND:
        return "its numbers cannot be trusted"
    if cause.kind == "rank" and cause.exit_code == 128 + SIGILL:
        return "the processor lacks an instruction that the program uses"
    return "it was asked to make way" if last.asked_to_yield else None


def _restarts_in_vain(past: Sequence[Past]) -> int:
    """Restarts since the last one that brought a newer checkpoint than there was."""
    count = 0
    for before, now in zip(reversed(past[:-1]), reversed(past[1:]), strict=True):
        if now.checkpoint_step > before.checkpoint_step:
            break
        count += 1
    return count


def _hosts(past: Sequence[Past], policy: Policy) -> tuple[str, ...]:
    """The hosts of the last attempt without those that failed too often, where enough are left.

    As many of them as a step's rows can be divided among; all as before, where that are too few.
    """
    hosts = past[-1].hosts
    kept = tuple(host for host in hosts if not _failed_too_often(host, past))
    if policy.min_nodes is None or kept == hosts:
        return hosts
    counts = range(len(kept), max(1, policy.min_nodes) - 1, -1)
    return next((kept[:count] for count in counts if _divide(kept[:count], past)), hosts)


def _failed_too_often(host: str, past: Sequence[Past]) -> bool:
    return sum(host in one.failed_hosts for one in past) >= FAULTS_OF_A_HOST


def _divide(hosts: Sequence[str], past: Sequence[Past]) -> bool:
    """Whether each of the ranks on these hosts gets as many micro-batches of a step as the others."""
    told = next((one for one in reversed(past) if one.micro_batches and one.ranks.keys() >= {*hosts}), None)
    return told is None or (told.micro_batches or 0) % sum(told.ranks[host] for host in hosts) == 0
