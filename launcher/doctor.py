"""falcon doctor: asks all hosts at once for all that can go wrong, before it does."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

from falcon_dist import ccl_environment
from launcher import discover, environment, probe
from launcher.cluster import HostFacts
from launcher.diagnosis import Findings
from launcher.discover import ANSWER_TIMEOUT_S, Agents, answers
from launcher.hostfile import Hostfile
from launcher.network import Meeting
from launcher.transport import Channel

EXAMINE_S: Final = 90.0
CLOCK_TRIES: Final = 3
CARRIED: Final = ("XDG_CACHE_HOME", "CXX")
"""What decides where the ccl backend is looked for, as a run would carry it."""


def look(agents: Agents, hosts: Hostfile, run_dir: str, *, with_torch: bool) -> list[Findings]:
    """What every host is like and how they reach each other.

    Raises:
        LaunchError: a host gave no answer, or no address of node 0 is reached by all.
    """
    facts = discover.ask(agents, {})
    offsets = discover.clock_offsets(agents, CLOCK_TRIES)
    meeting = discover.meet(agents, hosts)
    unreached, addrs = _mesh(agents, hosts, meeting)
    rates = _ring(agents.channels, addrs) if len(addrs) > 1 and not any(unreached) else [None] * len(facts)
    seats = _seats(agents, meeting) if with_torch and len(addrs) > 1 and not any(unreached) else [{}] * len(facts)
    surveyed = discover.survey(agents, cwd="/", script=None, run_dir=run_dir)
    probes = _probes(agents.channels) if with_torch and len(addrs) > 1 else [probe.NONE] * len(facts)
    examined = _examine(agents.channels, facts, surveyed, seats, probes, with_torch=with_torch)
    rows = zip(agents.channels, facts, examined, offsets, unreached, rates, strict=True)
    return [
        Findings(
            host=channel.host, facts=known, examined=told, clock_offset_s=off, unreached=missed, link_bytes_per_s=rate
        )
        for channel, known, told, off, missed, rate in rows
    ]


def _examine(
    channels: Sequence[Channel],
    facts: Sequence[HostFacts],
    surveyed: Sequence[Mapping[str, Any]],
    seats: Sequence[Mapping[str, str]],
    probes: Sequence[Mapping[str, Any]],
    *,
    with_torch: bool,
) -> list[dict[str, Any]]:
    """All that the agents find out; of hosts with the same software and processor one looks for leaks, for all.

    Not earlier, to gain time: it takes a core for some seconds, and the ring before it measures rates.
    """
    rows = zip(surveyed, facts, probes, strict=True)
    kinds = [(told["code"], told["isa"], known.versions, found["packages"]) for told, known, found in rows]
    first = [kinds.index(kind) for kind in kinds]
    for place, (channel, seat, found) in enumerate(zip(channels, seats, probes, strict=True)):
        with_leak = first[place] == place
        channel.send("examine", with_torch=with_torch, with_leak=with_leak, seat=seat, probe=found["probe"])
    examined = answers(channels, "examined", EXAMINE_S)
    alike = [_alike(examined[n]["alike"], None if n == place else channels[n].host) for place, n in enumerate(first)]
    return [
        {**known, **own, "torch": {**shared, **own["torch"]} if own["torch"] else {}}
        for known, own, shared in zip(surveyed, examined, alike, strict=True)
    ]


def _alike(told: Mapping[str, Any], elsewhere: str | None) -> dict[str, Any]:
    """What one host told for all with its software, of another host: a fault then says where it was found."""
    return {**told, "fault": f"{told['fault']} (on {elsewhere})"} if elsewhere and "fault" in told else dict(told)


def _probes(channels: Sequence[Channel]) -> Sequence[Mapping[str, Any]]:
    """Every host's compiled probe. Without it on one of them Python asks on all: they meet in one way only."""
    for channel in channels:
        channel.send("find_probe", cache=_cache())
    found = answers(channels, "probe_found", EXAMINE_S)  # torch's files are looked at, which may lie far away
    return found if all(told["probe"] for told in found) else [probe.NONE] * len(found)


def _cache() -> dict[str, str]:
    return {name: os.environ[name] for name in CARRIED if name in os.environ}


def _seats(agents: Agents, meeting: Meeting) -> list[dict[str, str]]:
    """The variables of one rank on each host; node 0 listens for them already."""
    port, _ = discover.open_store(agents, meeting.addr, courier=False)
    size = len(meeting.ifnames)
    met = environment.meeting_names(addr=meeting.addr, port=str(port), run_id="doctor", attempt=1, served=False)
    places = [
        environment.Seat(rank=n, local_rank=0, world_size=size, local_world_size=1, node_rank=n, num_nodes=size)
        for n in range(size)
    ]
    cache = _cache()
    return [
        cache | environment.seat_names(place) | met | {"GLOO_SOCKET_IFNAME": ifname, ccl_environment.INTERFACE: ifname}
        for place, ifname in zip(places, meeting.ifnames, strict=True)
    ]


def _mesh(agents: Agents, hosts: Hostfile, meeting: Meeting) -> tuple[list[tuple[str, ...]], list[str]]:
    """Whom each host does not reach, and the address of each on the network they meet on."""
    channels = agents.channels
    if len(channels) == 1:
        return [()], [meeting.addr]
    for channel in channels:
        channel.send("open_doors")
    doors = answers(channels, "doors", ANSWER_TIMEOUT_S)
    addrs = [_addr(told, ifname, meeting.addr) for told, ifname in zip(doors, meeting.ifnames, strict=True)]
    missed: list[list[str]] = [[] for _ in channels]
    for target, (told, addr) in enumerate(zip(doors, addrs, strict=True)):
        others = [place for place in range(len(channels)) if place != target]
        for place in others:
            channels[place].send("knock", doors={addr: told["ports"][addr]}, token=told["token"], source=None)
        knocked = answers([channels[place] for place in others], "knocked", ANSWER_TIMEOUT_S)
        for place, answer in zip(others, knocked, strict=True):
            if addr not in answer["reached"]:
                missed[place].append(hosts.entries[target].host)
    return [tuple(names) for names in missed], addrs


def _addr(doors: Mapping[str, Any], ifname: str, like: str) -> str:
    addresses: Mapping[str, str] = doors["addresses"]
    own = [addr for addr, name in addresses.items() if name == ifname and addr in doors["ports"]]
    return min(own, key=lambda addr: ((":" in addr) != (":" in like), addr != like))


def _ring(channels: Sequence[Channel], addrs: Sequence[str]) -> list[float | None]:
    """Bytes a second that each host takes from the one before it, all at once."""
    for channel, addr in zip(channels, addrs, strict=True):
        channel.send("open_ring", addr=addr)
    ports = [told["port"] for told in answers(channels, "ring_opened", ANSWER_TIMEOUT_S)]
    for place, channel in enumerate(channels):
        following = (place + 1) % len(channels)
        channel.send("ring", addr=addrs[following], port=ports[following])
    return [told["received_bytes_per_s"] for told in answers(channels, "ringed", ANSWER_TIMEOUT_S)]
