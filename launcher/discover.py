"""Starts an agent on every host and asks what the host is made of."""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from launcher.cluster import HostFacts
from launcher.errors import LaunchError
from launcher.hostfile import Hostfile
from launcher.topology import Topology
from launcher.transport import Channel, Transport

HELLO_TIMEOUT_S: Final = 30.0
STORE_TIMEOUT_S: Final = 10.0


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
        channels.extend(transport(entry) for entry in hostfile.entries)
        yield Agents(tuple(channels))
    finally:
        for channel in channels:
            channel.close()


def ask(agents: Agents, saved: Mapping[str, Topology], timeout_s: float = HELLO_TIMEOUT_S) -> tuple[HostFacts, ...]:
    """What every host told about itself; a topology in ``saved`` stands for the host's own.

    Raises:
        LaunchError: a host ended or did not answer in time.
    """
    hellos = _await(agents.channels, "hello", timeout_s)
    return tuple(_facts(channel.host, hello, saved) for channel, hello in zip(agents.channels, hellos, strict=True))


def open_store(agents: Agents, addr: str) -> int:
    """Has node 0's agent listen on ``addr`` alone; returns the port it got.

    Raises:
        LaunchError: it cannot.
    """
    first = agents.channels[0]
    first.send("open_store", addr=addr)
    (answer,) = _await((first,), "store", STORE_TIMEOUT_S)
    return int(answer["port"])


def _facts(host: str, hello: dict[str, Any], saved: Mapping[str, Topology]) -> HostFacts:
    topology = saved.get(host) or Topology.from_json(hello["topology"], host)
    return HostFacts(topology=topology, python=hello["python"], versions=hello["versions"])


def _await(channels: Sequence[Channel], event: str, timeout_s: float) -> list[dict[str, Any]]:
    found: dict[Channel, dict[str, Any]] = {}
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for channel in channels:
            selector.register(channel, selectors.EVENT_READ, channel)
        while len(found) < len(channels):
            ready = selector.select(deadline - time.monotonic())
            if not ready and time.monotonic() >= deadline:
                silent = ", ".join(c.host for c in channels if c not in found)
                raise LaunchError(f"{silent}: no answer from the agent within {timeout_s:g} s")
            for key, _ in ready:
                for message in _expect(key.data, event):
                    found[key.data] = message
    return [found[channel] for channel in channels]


def _expect(channel: Channel, event: str) -> list[dict[str, Any]]:
    messages = channel.receive()
    for message in messages:
        if message["event"] == "fault":
            raise LaunchError(f"{channel.host}: {message['text']}")
    if channel.ended:
        raise LaunchError(f"{channel.host}: the agent ended before it answered")
    return [m for m in messages if m["event"] == event]
