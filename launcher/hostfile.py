"""Hostfile: the hosts of a run in their order, the first one being node 0. Pure.

One host a line, in the ways of DeepSpeed, Open MPI, MPICH and LSF, ``#`` begins a comment:

    node1                    node[01-04,7] slots=2       me@node1:4
    node1 slots=4 max_slots=8      node1 4      [2001:db8::1]:2     node1 addr=10.0.0.1 ifname=ens5 cores=0-27
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from launcher.cpuset import CpuSet
from launcher.errors import UserError
from launcher.hostnames import MOST_HOSTS, check_address, check_interface, check_name, check_user, expand

LOCAL: Final = "localhost"
"""How this machine is called in a run that has no other."""
KEYS: Final = ("slots", "max_slots", "addr", "ifname", "cores")
MOST_SLOTS: Final = 65_536
LONGEST_FAULT: Final = 160
_IPV6: Final = re.compile(r"\[([0-9A-Fa-f:.%]*:[^\]]*)\](?::(.*))?")
_OUTSIDE_BRACKETS: Final = re.compile(r",(?![^\[]*\])")


@dataclass(frozen=True, kw_only=True, slots=True)
class HostEntry:
    """One host as the user named it."""

    host: str
    """Its name or address, without user and brackets."""
    user: str | None = None
    slots: int | None = None
    """How many ranks the host takes; None: nothing was said."""
    max_slots: int | None = None
    """How many it takes when more are asked for; None: no more than slots."""
    seats: tuple[int, ...] | None = None
    """Which of its slots are used, as --include and --exclude chose; None: all."""
    addr: str | None = None
    """Of node 0: where all meet. Of others: the address that they reach node 0 from. None: found out."""
    ifname: str | None = None
    """Network interface it reaches the others by; None: found out."""
    cores: CpuSet | None = None
    """Cpus a run may use; None: all that are allowed there."""
    line: int | None = None
    """Line of the hostfile, for errors; None: not from a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hostfile:
    """Hosts in node_rank order."""

    entries: tuple[HostEntry, ...]
    source: str = "--hosts"
    """The file they come from, or the flag."""

    def place_of(self, entry: HostEntry) -> str:
        """Where an entry was written, for errors."""
        return self.source if entry.line is None else f"{self.source}:{entry.line}"


def this_machine() -> Hostfile:
    """The one-entry hostfile of local mode; ranks meet on the loopback address, which no other host can reach."""
    return Hostfile(entries=(HostEntry(host=LOCAL, addr="127.0.0.1"),))


def parse(text: str, source: str) -> Hostfile:
    """The hosts of a hostfile's text.

    Raises:
        UserError: a line cannot be understood, a host stands there twice, or there is none.
    """
    entries: list[HostEntry] = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        words = line.partition("#")[0].split()
        if words:
            _add(entries, words, source, number)
    if not entries:
        raise UserError(f'{source}: a hostfile without hosts: "{source}"; give one host a line')
    return Hostfile(entries=tuple(entries), source=source)


def parse_list(text: str, source: str = "--hosts") -> Hostfile:
    """The hosts of ``a,b:2,node[1-3]``.

    Raises:
        UserError: as for a file.
    """
    entries: list[HostEntry] = []
    for item in _OUTSIDE_BRACKETS.split(text):
        words = item.split()
        if len(words) != 1:
            raise UserError(f'{source}: not a list of hosts: "{text}"; give names with commas between them')
        _add(entries, words, source, None)
    return Hostfile(entries=tuple(entries), source=source)


def _add(entries: list[HostEntry], words: list[str], source: str, line: int | None) -> None:
    place = source if line is None else f"{source}:{line}"
    try:
        new = list(_entries(words, line))
    except ValueError as fault:
        raise UserError(f"{place}: {_plain(str(fault))}; see docs/launching.md for what a line may say") from None
    known = {entry.host.lower(): entry for entry in entries}
    for entry in new:
        first = known.setdefault(entry.host.lower(), entry)
        if first is not entry:
            where = "" if first.line is None else f" (first on line {first.line})"
            raise UserError(f'{place}: a host that stands there twice{where}: "{entry.host}"; use slots=N for N ranks')
        entries.append(entry)
    if len(entries) > MOST_HOSTS:
        raise UserError(f'{place}: more than {MOST_HOSTS} hosts: "{words[0]}"; split the run')


def _plain(fault: str) -> str:
    """One line that a terminal can show, whatever the file held."""
    shown = "".join(c if c.isprintable() else "?" for c in fault)
    return shown if len(shown) <= LONGEST_FAULT else f'{shown[:LONGEST_FAULT]}..."'


def _entries(words: list[str], line: int | None) -> Iterator[HostEntry]:
    user, names, slots = _who(words[0])
    values = _values(words[1:], slots)
    first, *others = (
        HostEntry(
            host=check_name(host),
            user=user,
            slots=_count("slots", values),
            max_slots=_count("max_slots", values),
            addr=check_address(values["addr"].strip("[]")) if "addr" in values else None,
            ifname=check_interface(values["ifname"]) if "ifname" in values else None,
            cores=_cores(values["cores"]) if "cores" in values else None,
            line=line,
        )
        for host in names
    )
    if others and first.addr:
        raise ValueError(f'one address for {len(others) + 1} hosts: "addr={first.addr}"')
    if first.max_slots and first.max_slots < (first.slots or 1):
        raise ValueError(f'max_slots is less than slots: "{first.max_slots}"')
    return iter((first, *others))


def _who(word: str) -> tuple[str | None, Iterator[str], str | None]:
    """User, names and slots of ``[user@]name[:slots]``."""
    user, at, rest = word.rpartition("@")
    if at:
        check_user(user)
    if bracketed := _IPV6.fullmatch(rest):
        return user or None, iter([check_address(bracketed[1] or "")]), bracketed[2]
    name, colon, slots = rest.partition(":")
    if ":" in slots:
        raise ValueError(f'an IPv6 address needs brackets: "{rest}"')
    return user or None, expand(name), slots if colon else None


def _values(words: list[str], slots: str | None) -> Mapping[str, str]:
    found = {} if slots is None else {"slots": slots}
    for position, word in enumerate(words):
        key, equals, value = word.partition("=")
        if not equals and position == 0 and word.isascii() and word.isdigit():
            key, value = "slots", word
        elif not equals or key.replace("-", "_") not in KEYS:
            raise ValueError(f'not one of {", ".join(f"{k}=" for k in KEYS)}: "{word}"')
        key = key.replace("-", "_")
        if key in found:
            raise ValueError(f'said twice: "{word}"')
        found[key] = value
    return found


def _count(key: str, values: Mapping[str, str]) -> int | None:
    text = values.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= MOST_SLOTS):
        raise ValueError(f'{key} must be from 1 to {MOST_SLOTS}: "{text}"')
    return int(text)


def _cores(text: str) -> CpuSet:
    cores = CpuSet.parse(text)
    if not cores:
        raise ValueError(f'cores is a list of cpus like 0-27: "{text}"')
    return cores
