"""Starts an agent on every host and asks what the host is made of."""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from launcher import network
from launcher.cluster import HostFacts
from launcher.errors import LaunchError
from launcher.hello import PROTOCOL
from launcher.hostfile import Hostfile
from launcher.network import Meeting
from launcher.topology import Topology
from launcher.transport import Channel, Transport

HELLO_TIMEOUT_S: Final = 20.0
ANSWER_TIMEOUT_S: Final = 10.0
LEAVE_S: Final = 5.0
TOLD: Final = ("python", "python_version", "versions", "identity", "allocators", "compiler", "fabric")
"""What of an agent's first words becomes HostFacts as it is."""


@dataclass(frozen=True, slots=True)
class Agents:
    """The agents of a run."""

    channels: tuple[Channel, ...]
    """In node_rank order."""


@contextmanager
def agents(hostfile: Hostfile, transport: Transport) -> Iterator[Agents]:
    """One agent per host, started side by side; all of them (and what they still run) end with the block."""
    channels: list[Channel] = []
    try:
        channels.extend(transport(hostfile.entries))
        yield Agents(tuple(channels))
    finally:
        for channel in channels:
            channel.hang_up()
        deadline = time.monotonic() + LEAVE_S
        for channel in channels:
            channel.close(max(0.0, deadline - time.monotonic()) if channel.greeted else 0.0)


def ask(agents: Agents, saved: Mapping[str, Topology]) -> tuple[HostFacts, ...]:
    """What every host told about itself; a topology in ``saved`` stands for the host's own.

    Raises:
        LaunchError: a host could not be reached or did not answer in time; names all of them.
    """
    hellos = answers(agents.channels, "hello", HELLO_TIMEOUT_S)
    return tuple(_facts(channel.host, hello, saved) for channel, hello in zip(agents.channels, hellos, strict=True))


def meet(agents: Agents, hostfile: Hostfile) -> Meeting:
    """Finds the address of node 0 that all hosts reach, and each one's interface.

    Raises:
        LaunchError: there is none.
        UserError: the hostfile asks for one that cannot be.
    """
    first, *others = agents.channels
    if not others:
        return network.alone()
    first.send("open_doors")
    (doors,) = answers((first,), "doors", ANSWER_TIMEOUT_S)
    tried = network.candidates(hostfile, doors)
    ports = {addr: doors["ports"][addr] for addr in tried}
    for channel, entry in zip(others, hostfile.entries[1:], strict=True):
        channel.send("knock", doors=ports, token=doors["token"], source=network.way_out(entry))
    knocked = answers(others, "knocked", ANSWER_TIMEOUT_S)
    network.check_others(hostfile, [answer["addresses"] for answer in knocked])
    return network.choose(hostfile, doors, tried, [answer["reached"] for answer in knocked])


def survey(agents: Agents, *, cwd: str, script: str | None, run_dir: str) -> list[dict[str, Any]]:
    """Every host's answers to what is checked before a start.

    Raises:
        LaunchError: a host did not answer.
    """
    for channel in agents.channels:
        channel.send("survey", cwd=cwd, script=script, run_dir=run_dir)
    return answers(agents.channels, "surveyed", ANSWER_TIMEOUT_S)


def clock_offsets(agents: Agents, tries: int = 1) -> list[float]:
    """Seconds by which each host's clock is ahead of this one's, by the quickest of a few answers.

    Raises:
        LaunchError: a host did not answer.
    """
    best = [(float("inf"), 0.0)] * len(agents.channels)
    for _ in range(tries):
        for place, channel in enumerate(agents.channels):  # one after the other: a busy launcher is no slow link
            sent = time.time()
            channel.send("clock")
            (told,) = answers((channel,), "clock", ANSWER_TIMEOUT_S)
            took = time.time() - sent
            best[place] = min(best[place], (took, told["now"] - sent - took / 2))
    return [offset for _, offset in best]


def open_store(agents: Agents, addr: str, *, courier: bool) -> tuple[int, int | None]:
    """Has node 0's agent listen on ``addr`` alone; returns the ports of the store and of the courier it got.

    Raises:
        LaunchError: it cannot.
    """
    first = agents.channels[0]
    first.send("open_store", addr=addr, courier=courier)
    (answer,) = answers((first,), "store", ANSWER_TIMEOUT_S)
    return int(answer["port"]), answer["courier_port"]


def answers(channels: Sequence[Channel], event: str, timeout_s: float) -> list[dict[str, Any]]:
    """One event of this name from each channel.

    Raises:
        LaunchError: some gave none; one line for each of them.
    """
    found: dict[Channel, dict[str, Any]] = {}
    faults: dict[Channel, str] = {}
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for channel in channels:
            selector.register(channel, selectors.EVENT_READ, channel)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                _take(key.data, event, found, faults)
                if key.data in found or key.data in faults:
                    selector.unregister(key.fileobj)
    silent = {c: f"{c.host}: no answer within {timeout_s:g} s{_said(c)}" for c in channels if c not in found}
    if silent:
        raise LaunchError("\n".join((silent | faults).values()), tuple(channel.host for channel in silent | faults))
    return [found[channel] for channel in channels]


def _facts(host: str, hello: dict[str, Any], saved: Mapping[str, Topology]) -> HostFacts:
    if hello["protocol"] != PROTOCOL:
        text = f'{host}: another version of falcon-dist: protocol "{hello["protocol"]}"; install the same'
        raise LaunchError(text, (host,))
    return HostFacts(
        topology=saved.get(host) or Topology.from_json(hello["topology"], host),
        machine=f"{hello['hostname']} {hello['boot_id']}",
        **{key: hello[key] for key in TOLD},
    )


def _take(channel: Channel, event: str, found: dict[Channel, dict[str, Any]], faults: dict[Channel, str]) -> None:
    for message in channel.receive():
        if message["event"] == "fault":
            faults[channel] = f"{channel.host}: {message['text']}"
        elif message["event"] == event:
            found[channel] = message
    if channel.ended and channel not in found:
        faults.setdefault(channel, _why_ended(channel))


def _why_ended(channel: Channel) -> str:
    code = channel.close()
    remedy = f"; try: ssh -o BatchMode=yes {channel.host} true" if code == 255 else ""
    if code == 127:
        remedy = "; install falcon-dist there at the same path"
    return f"{channel.host}: no agent could be started: exit code {code}{_said(channel)}{remedy}"


def _said(channel: Channel) -> str:
    words = channel.last_words()
    return f': "{words}"' if words else ""
