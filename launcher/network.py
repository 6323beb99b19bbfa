"""Where hosts meet: an address of node 0 that every one of them has reached, and each one's way to it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from launcher.errors import HostError, LaunchError, UserError
from launcher.hostfile import HostEntry, Hostfile

NOT_PROBED: Final = "<probed>"
"""Stands for what only a real start finds out."""
LOOPBACK: Final = "127.0.0.1"
LOOPBACK_IFNAME: Final = "lo"
VIRTUAL: Final = ("docker", "veth", "br-", "virbr", "cni", "flannel", "podman", "tun", "tap")
"""Interfaces that seldom lead to another host: tried last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """How the hosts of a run reach each other."""

    addr: str
    """Address of node 0."""
    ifnames: tuple[str, ...]
    """Interface of each host that routes there, in node_rank order."""
    notes: tuple[str, ...] = ()


def alone() -> Meeting:
    """One host only: its ranks meet on the loopback address, which no other host can reach."""
    return Meeting(addr=LOOPBACK, ifnames=(LOOPBACK_IFNAME,))


def unprobed(hosts: Hostfile) -> Meeting:
    """What a dry run can say."""
    first = hosts.entries[0]
    return Meeting(addr=first.addr or NOT_PROBED, ifnames=tuple(e.ifname or NOT_PROBED for e in hosts.entries))


def candidates(hosts: Hostfile, doors: Mapping[str, Any]) -> tuple[str, ...]:
    """Addresses of node 0 worth knocking at, the likeliest first; ``doors``: what its agent told.

    Raises:
        UserError: the hostfile asks for an address or interface that node 0 does not have or others cannot reach.
    """
    first = hosts.entries[0]
    own: Mapping[str, str] = doors["addresses"]
    _check_own(hosts, first, own)
    entered_by: Sequence[str] = doors["entered_by"]
    usable = [a for a in own if a in doors["ports"] and not _is_loopback(a)]
    if first.addr:
        return (first.addr,)
    if first.ifname:
        usable = [a for a in usable if own[a] == first.ifname]
    return tuple(sorted(usable, key=lambda a: (a not in entered_by, own[a].startswith(VIRTUAL), ":" in a)))


def choose(
    hosts: Hostfile, doors: Mapping[str, Any], tried: Sequence[str], knocks: Sequence[Mapping[str, Mapping[str, str]]]
) -> Meeting:
    """The first address that every host has reached; ``knocks``: what each host but the first found.

    Raises:
        LaunchError: there is none.
    """
    others = hosts.entries[1:]
    for addr in tried:
        if all(_is_way(entry, reached.get(addr)) for entry, reached in zip(others, knocks, strict=True)):
            ifnames = (doors["addresses"][addr], *(reached[addr]["ifname"] for reached in knocks))
            return Meeting(addr=addr, ifnames=ifnames, notes=_notes(hosts.entries[0], addr, doors))
    found = [(entry.host, reached) for entry, reached in zip(others, knocks, strict=True)]
    cut_off = tuple(host for host, reached in found if not reached)
    raise LaunchError(_unreached(hosts.entries[0], tried, found), cut_off if len(cut_off) < len(others) else ())


def way_out(entry: HostEntry) -> str | None:
    """The source address or interface that the hostfile holds a host to."""
    return entry.addr or entry.ifname


def check_others(hosts: Hostfile, owns: Sequence[Mapping[str, str]]) -> None:
    """Raises UserError where the hostfile holds a host but the first to what it has not; ``owns``: what each has."""
    for entry, own in zip(hosts.entries[1:], owns, strict=True):
        _check_own(hosts, entry, own)


def _is_way(entry: HostEntry, reached: Mapping[str, str] | None) -> bool:
    """Whether a host has got there, and as the hostfile wants it to."""
    return reached is not None and entry.ifname in (None, reached["ifname"])


def _check_own(hosts: Hostfile, entry: HostEntry, own: Mapping[str, str]) -> None:
    place, host, addr, ifname = hosts.place_of(entry), entry.host, entry.addr, entry.ifname
    if addr and _is_loopback(addr):
        raise UserError(f'{place}: other hosts cannot reach a loopback address: "{addr}"; give another or none')
    if addr and addr not in own:
        raise HostError(f'{place}: not an address of {host}: "{addr}"; it has {_shown(own)}', (host,))
    if ifname and ifname not in own.values():
        raise HostError(f'{place}: not an interface of {host}: "{ifname}"; it has {_shown(own.values())}', (host,))
    if addr and ifname and own[addr] != ifname:
        raise HostError(f'{place}: {addr} of {host} is on {own[addr]}: "{ifname}"; give one of the two', (host,))


def _notes(first: HostEntry, addr: str, doors: Mapping[str, Any]) -> tuple[str, ...]:
    line = doors["loopback_name"]
    return (f"{first.host} calls itself loopback ({line}); the hosts meet at {addr}",) if line else ()


def _unreached(first: HostEntry, tried: Sequence[str], knocks: list[tuple[str, Mapping[str, Any]]]) -> str:
    if not tried:
        return f"{first.host}: has no address but loopback; give it one, or run on this host alone"
    lines = [f'{first.host}: no address of it is reached by all hosts: "{", ".join(tried)}"; open the firewall,']
    lines[0] += " or give addr= and ifname= in the hostfile"
    lines += [f"  {host} reached {', '.join(reached) or 'none of them'}" for host, reached in knocks]
    return "\n".join(lines)


def _is_loopback(addr: str) -> bool:
    return addr.startswith("127.") or addr == "::1"


def _shown(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))
