"""Serves a run's rendezvous on a listening socket it is given: ``python -m falcon_dist.store FD ADDR WORLD_SIZE``.

For programs that open their group with ``env://``: left to themselves they would listen on every interface.
"""

from __future__ import annotations

import socket
import sys

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in torch's stubs


def serve(descriptor: int, addr: str, port: int, world_size: int) -> TCPStore:
    """A store that answers on the socket behind ``descriptor`` for as long as the value is kept."""
    return TCPStore(addr, port, world_size, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)


def main(argv: list[str]) -> None:
    """Serves until standard input ends, that is until the process that started this one is gone."""
    descriptor, addr, world_size = int(argv[0]), argv[1], int(argv[2])
    listening = socket.socket(fileno=descriptor)
    port = listening.getsockname()[1]
    listening.detach()  # the store owns it from here on
    store = serve(descriptor, addr, port, world_size)
    sys.stdin.read()
    del store


if __name__ == "__main__":
    main(sys.argv[1:])
