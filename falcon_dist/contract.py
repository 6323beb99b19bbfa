"""What the launcher and a rank agree on: environment names, exit codes, events, the rank's result.

Standard library only: the launcher imports this module on machines without torch.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal


class UserError(Exception):
    """A fault in what the user gave: shown as its one line, without a traceback, exit code 2."""


class UnsoundError(Exception):
    """Numbers that cannot be trusted: shown as one line, without a traceback, exit code EXIT_UNSOUND."""


EXIT_USER_ERROR: Final = 2
"""Exit code of a launcher or rank that refuses its input."""
EXIT_FAILED: Final = 1
"""Exit code where something failed that is nobody's input."""
EXIT_UNSOUND: Final = 3
"""Exit code of a rank whose numbers cannot be trusted (NaN, replicas that differ): starting again would not help."""
EXIT_STOPPED: Final = 75
"""Exit code of a launcher or rank that was asked to make way and has saved: to be started again with --resume.

EX_TEMPFAIL of sysexits.h; a site can name it in Slurm's RequeueExit.
"""
NOT_RETRIED: Final = (EXIT_USER_ERROR, EXIT_UNSOUND)
"""Exit codes after which no further attempt is made."""

STACKS_SIGNAL: Final = signal.SIGUSR1
"""Asks a rank to write the stacks of all its threads to ``stacks.txt`` in its folder; see the event "takes"."""
EMERGENCY_SIGNAL: Final = signal.SIGUSR2
"""Asks a rank to commit a checkpoint of its last finished step: a peer is gone; see the event "takes".

Sent to one survivor only, which then is the one writer; the others are asked to end. Its main thread may be in a
collective that will never end, so somebody else has to listen. It has ``EMERGENCY_GRACE_S`` to say
{"event": "checkpoint", "emergency": true}; then, or when it ends, or when the time is over, it is ended too. A rank
whose collective fails because a peer is gone waits ``EMERGENCY_WAIT_S`` for the signal before it ends by itself.
"""
STOP_SIGNAL: Final = signal.SIGRTMIN
"""Asks rank 0 to have all ranks end after the step they are in, save, and exit with EXIT_STOPPED."""
EMERGENCY_WAIT_S: Final = 15.0
"""A silent host is noticed after 10 s; whose link is cut may know earlier than the launcher does."""
EMERGENCY_GRACE_S: Final = 60.0
"""How long an emergency checkpoint may take, unless ``launch.emergency_grace_s`` says otherwise."""

PEER_IS_GONE: Final = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe"),
    *("connection was closed", "recvValue failed", "Socket Timeout", "Timed out waiting", "peer is gone"),
    *("Failed to recv, got 0 bytes", "Failed to send, sent 0 bytes"),
)
"""What torch, gloo and oneCCL say in a rank whose peer has died; "peer is gone" is ccl/src/executor.cpp's."""

PREPARING_FAULT: Final = "preparing from node 0: "
"""How the line begins that tells why what node 0 has prepared did not arrive, on either side."""

# torchrun's names, so that any torch.distributed program finds what it knows.
RANK: Final = "RANK"
LOCAL_RANK: Final = "LOCAL_RANK"
WORLD_SIZE: Final = "WORLD_SIZE"
LOCAL_WORLD_SIZE: Final = "LOCAL_WORLD_SIZE"
GROUP_RANK: Final = "GROUP_RANK"
GROUP_WORLD_SIZE: Final = "GROUP_WORLD_SIZE"
MASTER_ADDR: Final = "MASTER_ADDR"
MASTER_PORT: Final = "MASTER_PORT"
RUN_ID: Final = "TORCHELASTIC_RUN_ID"
RESTART_COUNT: Final = "TORCHELASTIC_RESTART_COUNT"
USE_AGENT_STORE: Final = "TORCHELASTIC_USE_AGENT_STORE"

# Ours.
RANK_DIR: Final = "FALCON_RANK_DIR"
"""Folder of this rank's logs, steps.jsonl and result.json (absolute path)."""
PLANNED_CPUS: Final = "FALCON_CPUS"
"""The cpus this rank was bound to, as "0-3,8"; unset when nothing was planned."""
PLANNED_THREADS: Final = "FALCON_THREADS"
"""How many compute threads the binding has cores for."""
STORE_FD: Final = "FALCON_STORE_FD"
"""Descriptor of the listening rendezvous socket (rank 0 of our own program only)."""
EVENT_FD: Final = "FALCON_EVENT_FD"
"""Descriptor this rank writes its events to, one JSON object a line; unset under plain torchrun."""
PREPARED: Final = "FALCON_PREPARED"
"""File that says where this host has what was prepared on node 0; unset on node 0 and where one host prepares."""
BACKEND: Final = "FALCON_BACKEND"
"""The collective backend the launcher settled on: "gloo", "ccl" or "ccl-intel"."""

RESULT_FILE: Final = "result.json"
STEPS_FILE: Final = "steps.jsonl"
STACKS_FILE: Final = "stacks.txt"

Status = Literal["ok", "stopped", "failed"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RankResult:
    """What a rank leaves behind in ``result.json``."""

    status: Status
    error: str | None = None
    """First line of the error, where the rank lived to tell it."""
    observed_cpus: str | None = None
    """Affinity mask at the end, as "0-3,8"."""
    observed_threads: int | None = None
    """torch's intra-op thread count."""
    last_step: int = 0
    """Last finished optimizer step."""
    checkpoint: str | None = None
    """Newest committed checkpoint of this run (absolute path), told by rank 0."""
    peak_rss_bytes: int | None = None
    """VmHWM at the end."""
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Rank 0's closing figures: phase times, evaluation, samples, row counts."""

    def write(self, rank_dir: Path) -> None:
        """Writes result.json whole or not at all."""
        partial = rank_dir / f"{RESULT_FILE}.partial"
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        partial.rename(rank_dir / RESULT_FILE)

    @classmethod
    def read(cls, rank_dir: Path) -> RankResult | None:
        """The result in this folder, or None where the rank left none that can be read."""
        try:
            values = json.loads((rank_dir / RESULT_FILE).read_text())
            return cls(**values)
        except (OSError, ValueError, TypeError):
            return None


# Events a rank writes to EVENT_FD. Every event is one flat JSON object with the key "event":
#   {"event": "bound", "cpus": "0-3", "threads": 4}      once, after torch is imported
#   {"event": "phase", "name": "train"}                  a phase begins (all ranks)
#   {"event": "line", "text": "..."}                     a line for the person watching (rank 0)
#   {"event": "step", "step": 3, "total": 50, "loss": 2.1, "lr": 1e-4, "epoch": 0.1,
#    "tokens_per_s": 812.0, "eta_s": 60.0, "log": true,  a finished step (all ranks; rank 0's is shown;
#    "busy_s": 0.8, "waited_s": 0.1}                      "log" asks for a line of its own; seconds of own work and of
#                                                         waiting for peers: who is slow waits least); "gemm_share"
#                                                         and "parts" as in steps.jsonl
#   {"event": "checkpoint", "path": "...", "step": 3}    committed (rank 0); with "emergency": true by whichever
#                                                         rank was asked for it
#   {"event": "takes", "signal": "stacks"}               from now on STACKS_SIGNAL is understood; "save" likewise
#                                                         for EMERGENCY_SIGNAL (whole replicas only), "stop" for
#                                                         STOP_SIGNAL. A rank that did not say so is never sent that
#                                                         signal
#   {"event": "summary", "lines": ["..."]}               the closing text (rank 0)
