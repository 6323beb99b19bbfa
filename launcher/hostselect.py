"""Which hosts of a hostfile a run takes: --include, --exclude (DeepSpeed's syntax) and --nnodes. Pure."""

from __future__ import annotations

import dataclasses
from typing import Final

from launcher.errors import UserError
from launcher.hostfile import HostEntry, Hostfile
from launcher.hostnames import expand

SYNTAX: Final = "NAME@NAME or NAME:SLOT,SLOT@NAME"


def select(
    hosts: Hostfile, *, include: str | None, exclude: str | None, nnodes: int | None, min_nodes: int | None = None
) -> Hostfile:
    """The hosts that are left, in the hostfile's order.

    Raises:
        UserError: a filter names what is not there, leaves nothing, or there are fewer hosts than nodes wanted.
    """
    if include is not None and exclude is not None:
        raise UserError(f'--include: not beside --exclude: "{include}"; give one of the two')
    entries = hosts.entries
    if include is not None:
        entries = _included(hosts, include)
    if exclude is not None:
        entries = _excluded(hosts, exclude)
    if min_nodes is not None and min_nodes > len(entries):
        raise UserError(f'--min-nodes: there are {len(entries)} hosts: "{min_nodes}"; name more, or ask for fewer')
    if nnodes is not None:
        entries = _first(entries, nnodes if min_nodes is None else min(nnodes, len(entries)))
    return dataclasses.replace(hosts, entries=entries)


def _first(entries: tuple[HostEntry, ...], nnodes: int) -> tuple[HostEntry, ...]:
    if not 1 <= nnodes <= len(entries):
        raise UserError(f'--nnodes: must be from 1 to {len(entries)}, the number of hosts: "{nnodes}"')
    return entries[:nnodes]


def _included(hosts: Hostfile, text: str) -> tuple[HostEntry, ...]:
    wanted = _read("--include", text, hosts)
    return tuple(_with_seats(e, wanted[e.host]) for e in hosts.entries if e.host in wanted)


def _excluded(hosts: Hostfile, text: str) -> tuple[HostEntry, ...]:
    unwanted = _read("--exclude", text, hosts)
    left: list[HostEntry] = []
    for entry in hosts.entries:
        out = unwanted.get(entry.host, ())
        seats = tuple(seat for seat in range(entry.slots or 0) if seat not in (out or ()))
        if entry.host not in unwanted:
            left.append(entry)
        elif out is not None and seats:
            left.append(_with_seats(entry, seats))
    if not left:
        raise UserError(f'--exclude: leaves no host: "{text}"')
    return tuple(left)


def _with_seats(entry: HostEntry, seats: tuple[int, ...] | None) -> HostEntry:
    return dataclasses.replace(entry, seats=seats)


def _read(flag: str, text: str, hosts: Hostfile) -> dict[str, tuple[int, ...] | None]:
    """Hosts that are named, each with its slots; None: all of them."""
    known = {entry.host: entry for entry in hosts.entries}
    found: dict[str, tuple[int, ...] | None] = {}
    for part in text.split("@"):
        names, colon, slots = _cut(part, known)
        for name in names:
            if name not in known:
                raise UserError(f'{flag}: no such host: "{name}"; hosts: {_shown(list(known))}; form: {SYNTAX}')
            if name in found:
                raise UserError(f'{flag}: a host that is named twice: "{name}"')
            found[name] = _seats(flag, known[name], slots) if colon else None
    return found


def _cut(part: str, known: dict[str, HostEntry]) -> tuple[list[str], str, str]:
    if part.strip("[]") in known:  # an IPv6 address has colons of its own
        return [part.strip("[]")], "", ""
    name, colon, slots = part.rpartition(":") if ":" in part else (part, "", "")
    if name.strip("[]") in known:
        return [name.strip("[]")], colon, slots
    try:
        return list(expand(name)), colon, slots
    except ValueError:
        return [name], colon, slots


def _seats(flag: str, entry: HostEntry, text: str) -> tuple[int, ...]:
    if entry.slots is None:
        raise UserError(f'{flag}: {entry.host} has no slots=N in the hostfile, so this names nothing: ":{text}"')
    parts = text.split(",")
    if not all(p.isascii() and p.isdigit() and len(p) <= 9 and int(p) < entry.slots for p in parts):
        raise UserError(f'{flag}: slots of {entry.host} are 0 to {entry.slots - 1}: "{text}"; form: {SYNTAX}')
    return tuple(sorted({int(p) for p in parts}))


def _shown(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
