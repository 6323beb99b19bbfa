"""Starts the ranks of a small program as real processes and collects what became of them."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one rank ended."""

    code: int
    text: str


def start_ranks(program: Path, *args: str, ranks: int, **env: str) -> list[subprocess.Popen[str]]:
    """The running processes, in rank order."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(program), *args],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def collect(children: list[subprocess.Popen[str]], timeout_s: float = 120) -> list[Outcome]:
    """Waits for all; what still runs at the end is killed and fails the test."""
    try:
        return [Outcome(text=child.communicate(timeout=timeout_s)[0], code=child.returncode) for child in children]
    finally:
        for child in children:
            child.kill()


def run_ranks(program: Path, *args: str, ranks: int, **env: str) -> list[Outcome]:
    """Starts and collects."""
    return collect(start_ranks(program, *args, ranks=ranks, **env))
