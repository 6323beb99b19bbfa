"""Which addresses of a host the others can reach: one end opens doors, the other knocks, nobody guesses."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from launcher.errors import LaunchError

SIOCGIFCONF: Final = 0x8912
IFREQ_BYTES: Final = 40
MOST_ADDRESSES: Final = 256
HOSTS_FILE: Final = Path("/etc/hosts")
LINK_LOCAL_V6: Final = "fe80"
KNOCK_S: Final = 3.0
OTHERS_S: Final = 0.3
TOKEN_BYTES: Final = 16


class Doors:
    """A listening socket on every address of this host; whoever comes is told this host's token."""

    def __init__(self) -> None:
        self._token = os.urandom(TOKEN_BYTES).hex()
        self._addresses = addresses()
        self._sockets: dict[str, socket.socket] = {}
        for addr in self._addresses:
            with contextlib.suppress(OSError):  # an address on its way out
                self._sockets[addr] = _listen(addr)

    def facts(self) -> dict[str, Any]:
        """What the launcher needs to have the others knock."""
        return {
            "token": self._token,
            "ports": {addr: door.getsockname()[1] for addr, door in self._sockets.items()},
            "addresses": self._addresses,
            "entered_by": os.environ.get("SSH_CONNECTION", "").split(" ")[2:3],
            "loopback_name": loopback_line(socket.gethostname()),
        }

    def answers(self) -> list[tuple[int, Callable[[], None]]]:
        """Descriptors to wait for, and what to do then."""
        return [(door.fileno(), partial(self._answer, door)) for door in self._sockets.values()]

    def close(self) -> None:
        """Nobody can knock any more."""
        for door in self._sockets.values():
            door.close()

    def _answer(self, door: socket.socket) -> None:
        with contextlib.suppress(OSError):
            caller, _ = door.accept()
            with caller:
                caller.send(self._token.encode())


def addresses() -> dict[str, str]:
    """Every address of this host that is up, with its interface: loopback included, link-local not."""
    return _ipv4() | _ipv6()


def knock(doors: Mapping[str, int], token: str, source: str | None) -> dict[str, dict[str, str]]:
    """Addresses that lead to the host with this token, each with the source and interface that routes there.

    ``source``: leave by the interface with this name or address only.
    """
    own = addresses()
    found: dict[str, dict[str, str]] = {}
    with selectors.DefaultSelector() as selector, contextlib.ExitStack() as open_sockets:
        for addr, port in doors.items():
            leaves_by = _source_for(addr, source, own)
            if source is not None and leaves_by is None:
                continue  # it has no address of this family
            if caller := _call(addr, port, leaves_by):
                open_sockets.enter_context(caller)
                selector.register(caller, selectors.EVENT_READ, addr)
        deadline = time.monotonic() + KNOCK_S
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                selector.unregister(key.fileobj)
                if seen := _seen(key.fileobj, token, own):  # type: ignore[arg-type]  # a socket, as registered
                    found[key.data] = seen
                    # Bridges of containers never answer; what leads here at all answers about as fast as this one.
                    deadline = min(deadline, time.monotonic() + OTHERS_S)
    return found


def check_own(addr: str) -> None:
    """Raises LaunchError where this host does not reach its own address: ranks that meet there would wait in vain."""
    with contextlib.closing(_listen(addr)) as door, socket.socket(_family(addr), socket.SOCK_STREAM) as caller:
        caller.settimeout(KNOCK_S)
        try:
            caller.connect((addr, door.getsockname()[1]))
        except OSError as fault:
            raise LaunchError(f'does not reach its own address "{addr}": {fault}; look at the firewall') from fault


def loopback_line(name: str) -> str | None:
    """The line of /etc/hosts that makes a name loopback, as "/etc/hosts:2: 127.0.1.1 node1"; None: there is none."""
    try:
        lines = HOSTS_FILE.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if name in words[1:] and (words[0].startswith("127.") or words[0] == "::1"):
            return f"{HOSTS_FILE}:{number}: {' '.join(words)}"
    return None


def _listen(addr: str) -> socket.socket:
    door = socket.socket(_family(addr), socket.SOCK_STREAM)
    try:
        door.bind((addr, 0))
        door.listen(1024)
        door.setblocking(False)
    except OSError:
        door.close()
        raise
    return door


def _call(addr: str, port: int, source: str | None) -> socket.socket | None:
    caller = socket.socket(_family(addr), socket.SOCK_STREAM)
    caller.setblocking(False)
    try:
        if source is not None:
            caller.bind((source, 0))
        caller.connect_ex((addr, port))
    except OSError:
        caller.close()
        return None
    return caller


def _source_for(addr: str, source: str | None, own: Mapping[str, str]) -> str | None:
    if source is None or source in own:
        return source
    return next((a for a, ifname in own.items() if ifname == source and _family(a) == _family(addr)), None)


def _seen(caller: socket.socket, token: str, own: Mapping[str, str]) -> dict[str, str] | None:
    try:
        answer = caller.recv(4 * TOKEN_BYTES).decode(errors="replace")
        source = caller.getsockname()[0]
    except OSError:
        return None
    return {"source": source, "ifname": own[source]} if answer == token and source in own else None


def _family(addr: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in addr else socket.AF_INET


def _ipv4() -> dict[str, str]:
    room = array.array("B", bytes(IFREQ_BYTES * MOST_ADDRESSES))
    request = struct.pack("iP", len(room), room.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        used, _ = struct.unpack("iP", fcntl.ioctl(any_socket.fileno(), SIOCGIFCONF, request))
    found: dict[str, str] = {}
    for at in range(0, used, IFREQ_BYTES):
        name = bytes(room[at : at + 16]).partition(b"\0")[0].decode(errors="replace")
        found[socket.inet_ntoa(bytes(room[at + 20 : at + 24]))] = name.partition(":")[0]  # "eth0:1" is a label of eth0
    return found


def _ipv6() -> dict[str, str]:
    try:
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    except OSError:
        return {}
    usable = [row for row in rows if not row[0].startswith(LINK_LOCAL_V6)]
    return {socket.inet_ntop(socket.AF_INET6, bytes.fromhex(row[0])): row[5] for row in usable}
