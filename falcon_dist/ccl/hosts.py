"""Which ranks share this host, and by which interface the others are reached."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Final

from torch._C._distributed_c10d import Store

from falcon_dist import contract
from falcon_dist.ccl_environment import INTERFACE
from falcon_dist.contract import UserError

_SIOCGIFADDR: Final = 0x8915  # linux/sockios.h: the IPv4 address of an interface


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where this rank stands."""

    local_rank: int
    local_size: int
    interface: str


def find_place(store: Store, rank: int, size: int, timeout: timedelta) -> Place:
    """From the launcher's environment where it says so, else by asking the other ranks through ``store``."""
    local = _from_environment(os.environ) or _from_store(store, rank, size, timeout)
    given = os.environ.get(INTERFACE)
    if given:
        check_interface(given)
    interface = given or route_interface(os.environ.get(contract.MASTER_ADDR, "127.0.0.1"))
    return Place(local_rank=local[0], local_size=local[1], interface=interface)


def _from_environment(env: Mapping[str, str]) -> tuple[int, int] | None:
    try:
        return int(env[contract.LOCAL_RANK]), int(env[contract.LOCAL_WORLD_SIZE])
    except (KeyError, ValueError):
        return None


def _from_store(store: Store, rank: int, size: int, timeout: timedelta) -> tuple[int, int]:
    here = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + socket.gethostname()
    store.set(f"place/{rank}", here)
    keys = [f"place/{other}" for other in range(size)]
    store.wait(keys, timeout)
    neighbours = [other for other, key in enumerate(keys) if store.get(key).decode() == here]
    return neighbours.index(rank), len(neighbours)


def check_interface(name: str) -> None:
    """Raises UserError where this host has no such interface: libfabric would take any other one silently."""
    known = [interface for _, interface in socket.if_nameindex()]
    if name not in known:
        raise UserError(f'{INTERFACE}: no such interface: "{name}"; this host has {", ".join(known)}')


def route_interface(address: str) -> str:
    """Name of the interface from which this host reaches ``address`` ("lo" for its own addresses).

    Nothing is sent: a datagram socket is connected, which only asks the routing table.
    Raises UserError where there is no route or the interface has no name.
    """
    try:
        family, kind, proto, _, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.connect(target)
            local = str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"oneCCL: no route to the master address {address!r}: {error}; "
            f"correct {contract.MASTER_ADDR} or set {INTERFACE}"
        ) from error
    name = _interface_of(local)
    if name is None:
        raise UserError(f"oneCCL: no interface has the address {local} that routes to {address!r}; set {INTERFACE}")
    return name


def _interface_of(address: str) -> str | None:
    if address.startswith("127.") or address == "::1":
        return "lo"
    if ":" in address:
        return _ipv6_interface(address.split("%", maxsplit=1)[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # an interface without an IPv4 address
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _ipv6_interface(address: str) -> str | None:
    packed = socket.inet_pton(socket.AF_INET6, address).hex()
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        fields = line.split()
        if fields[0] == packed:
            return fields[5]
    return None
