"""What ``falcon doctor`` has an agent find out: limits, shared memory, the speed of a link, torch's facts."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

from falcon_dist.contract import STORE_FD
from launcher import memory, onednn
from launcher.wire import CHUNK_BYTES

TORCH_S: Final = 60.0
RING_S: Final = 1.0
RING_WAIT_S: Final = 3.0


def host(
    *, with_torch: bool, with_leak: bool, seat: Mapping[str, str], listening: socket.socket | None = None
) -> dict[str, Any]:
    """Limits and memory of this host, and what needs torch if that is wanted too.

    ``with_leak``: besides, whether packed samples see each other.
    ``seat``: the variables of a rank that takes part in an all_reduce of all hosts; empty: there is none.
    ``listening``: where their store is served, on the first of them.
    """
    shm = os.statvfs("/dev/shm")  # noqa: S108  # the very place that is asked about
    return {
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "processes": resource.getrlimit(resource.RLIMIT_NPROC)[0],
        "locked_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "shm_bytes": shm.f_bavail * shm.f_frsize,
        "memory_free_bytes": memory.available_bytes(),
        "load": os.getloadavg()[0],
        "torch": _torch(seat, listening, with_leak=with_leak) if with_torch else {},
    }


def _torch(seat: Mapping[str, str], listening: socket.socket | None, *, with_leak: bool) -> dict[str, Any]:
    """What falcon_dist.host_facts tells of this host; "fault" where it cannot."""
    words = [sys.executable, "-P", "-m", "falcon_dist.host_facts", *(["--leak"] if with_leak else [])]
    fds = [] if listening is None else [listening.fileno()]
    env = os.environ | seat | onednn.VERBOSE | ({STORE_FD: str(fds[0])} if fds else {})
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=TORCH_S, check=False, env=env, pass_fds=fds
        )
        told = json.loads(done.stdout.splitlines()[-1])
        return {**told, "bf16_kernel": onednn.first_kernel(done.stdout)}
    except subprocess.TimeoutExpired:
        return {"fault": f"no answer within {TORCH_S:g} s"}
    except (ValueError, IndexError, TypeError):
        return {"fault": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}


def ring(listening: socket.socket, addr: str, port: int) -> dict[str, float]:
    """Sends to one neighbour and takes from the other for a while; bytes per second that came in.

    All hosts of a ring do so at the same time, as the ranks of an all-reduce do.
    """
    deadline = time.monotonic() + RING_WAIT_S
    with socket.create_connection((addr, port), RING_WAIT_S) as out:
        listening.settimeout(max(0.1, deadline - time.monotonic()))
        taken, _ = listening.accept()
        with taken:
            return {"received_bytes_per_s": _exchange(out, taken)}


def _exchange(out: socket.socket, taken: socket.socket) -> float:
    data, received, begun = bytes(CHUNK_BYTES), 0, time.monotonic()
    out.setblocking(False)
    taken.setblocking(False)
    with selectors.DefaultSelector() as selector:
        selector.register(out, selectors.EVENT_WRITE)
        selector.register(taken, selectors.EVENT_READ)
        while (now := time.monotonic()) < begun + RING_S:
            for key, _ in selector.select(begun + RING_S - now):
                # Neighbours end a moment earlier or later.
                with contextlib.suppress(ConnectionError):
                    if key.fileobj is out:
                        out.send(data)
                    else:
                        received += len(taken.recv(CHUNK_BYTES))
    return received / RING_S
