"""Which agents are silent. Pure: what was heard when, and the time, are handed in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, NamedTuple, Protocol

from launcher.wire import SILENCE_S

ALONE: Final = "the host, its link or its agent is dead"
"""Said of one host that falls silent while others do not."""
TOGETHER: Final = "what they share, a disk or a network, may stand still"


class Heard(Protocol):
    """What is known of an agent's words."""

    host: str
    heard_at: float
    """When it last said something; seconds on the clock of ``now``."""
    held_at: float
    """When it was last said that a disk holds it."""

    def fileno(self) -> int:
        """Descriptor its words come from."""


class Silent(NamedTuple):
    """Agents that count as dead."""

    node_ranks: tuple[int, ...]
    text: str
    blamed: bool
    """One host alone is silent, so that it is at fault."""


def silent(living: Mapping[int, Heard], ready: Collection[int], now: float, *, running: bool) -> Silent:
    """Agents without a word for too long.

    ``ready``: descriptors with words that nobody has read yet, which break a silence.
    ``running``: ranks train, so that an agent may be held by a disk as long as it takes; while they end it has to obey.
    """
    since = {n: now - (max(one.heard_at, one.held_at) if running else one.heard_at) for n, one in living.items()}
    quiet = [n for n, one in living.items() if since[n] > SILENCE_S / 2 and one.fileno() not in ready]
    text = f"{', '.join(living[n].host for n in quiet)}: nothing heard for {SILENCE_S:g} s: "
    dead = tuple(n for n in quiet if since[n] > SILENCE_S)
    return Silent(dead, text + (TOGETHER if quiet[1:] else ALONE), blamed=len(quiet) == 1)


def held(living: Mapping[int, Heard]) -> dict[int, str]:
    """What to say of agents that a disk has held for long enough to be noticed."""
    return {
        n: f"{one.host}: its agent is held by a disk that does not answer, as of a file server; the ranks go on"
        for n, one in living.items()
        if one.held_at - one.heard_at > SILENCE_S / 2
    }
