"""Hostfile: the hosts of a run in their order, the first one being node 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LOCAL: Final = "localhost"
"""How this machine is called in a run that has no other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostEntry:
    """One host as the user named it."""

    host: str
    user: str | None = None
    slots: int | None = None
    """How many ranks the host takes; None: nothing was said."""
    addr: str | None = None
    """Address the other hosts reach it at; None: found out."""
    line: int | None = None
    """Line of the hostfile, for errors; None: not from a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hostfile:
    """Hosts in node_rank order."""

    entries: tuple[HostEntry, ...]


def this_machine() -> Hostfile:
    """The one-entry hostfile of local mode; ranks meet on the loopback address, which no other host can reach."""
    return Hostfile(entries=(HostEntry(host=LOCAL, addr="127.0.0.1"),))
