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
from dataclasses import dataclass
from typing import Any, Final

from falcon_dist.contract import STORE_FD
from launcher import memory, onednn
from launcher import probe as probes
from launcher.wire import CHUNK_BYTES

TORCH_S: Final = 60.0
RING_S: Final = 1.0
RING_WAIT_S: Final = 3.0


def host(
    *,
    with_torch: bool,
    with_leak: bool,
    seat: Mapping[str, str],
    probe: Mapping[str, str],
    listening: socket.socket | None = None,
) -> dict[str, Any]:
    """Limits and memory of this host, and what needs torch if that is wanted too.

    ``with_leak``: besides, as "alike", what holds for every host with this one's software: whether packed samples
    see each other.
    ``seat``: the variables of a rank that takes part in an all_reduce of all hosts; empty: there is none.
    ``probe``: the compiled one, as launcher.probe found it; empty: Python tells.
    ``listening``: where their store is served, on the first of them.
    """
    shm = os.statvfs("/dev/shm")  # noqa: S108  # the very place that is asked about
    own, alike = _torch(seat, probe, listening, with_leak=with_leak) if with_torch else ({}, {})
    return {
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "processes": resource.getrlimit(resource.RLIMIT_NPROC)[0],
        "locked_bytes": resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "shm_bytes": shm.f_bavail * shm.f_frsize,
        "memory_free_bytes": memory.available_bytes(),
        "load": os.getloadavg()[0],
        "torch": own,
        "alike": alike,
    }


def _torch(
    seat: Mapping[str, str], probe: Mapping[str, str], listening: socket.socket | None, *, with_leak: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is told of this host, and of all with its software; "fault" where nothing is."""
    python = [sys.executable, "-P", "-m", "falcon_dist.host_facts"]
    if not probe:
        told = _told(_start([*python, "--leak"] if with_leak else python, seat, listening))
        return told, {"leak": told["leak"]} if "leak" in told else {}
    # Side by side: the other hosts do not wait for the model to be imported.
    leak = _start([*python, "--leak"], {}) if with_leak else None
    own = _told(_start([probe["path"]], {**probes.environment(probe, seat), **seat}, listening), "probe: ")
    alike = _told(leak) if leak else {}
    return own, {name: value for name, value in alike.items() if name in ("leak", "fault")}


@dataclass(frozen=True, slots=True)
class _Child:
    process: subprocess.Popen[str]
    deadline: float


def _start(words: list[str], env: Mapping[str, str], listening: socket.socket | None = None) -> _Child:
    fds = [] if listening is None else [listening.fileno()]
    known = {**os.environ, **env, **onednn.VERBOSE, **({STORE_FD: str(fds[0])} if fds else {})}
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, errors="replace", env=known, pass_fds=fds)
    return _Child(process, time.monotonic() + TORCH_S)


def _told(child: _Child, name: str = "") -> dict[str, Any]:
    """The JSON of its last line, and the kernel that oneDNN's lines tell of; "fault" where there is none."""
    with child.process as process:
        try:
            out, err = process.communicate(timeout=max(0.0, child.deadline - time.monotonic()))
            return {**json.loads(out.splitlines()[-1]), "bf16_kernel": onednn.first_kernel(out)}
        except subprocess.TimeoutExpired:
            process.kill()
            return {"fault": f"{name}no answer within {TORCH_S:g} s"}
        except (ValueError, IndexError, TypeError):
            return {"fault": name + (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]}


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
