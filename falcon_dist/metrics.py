"""What a rank tells while it runs: events for the launcher, step records on disk."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from falcon_dist import contract, lines
from falcon_dist.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One finished optimizer step, as kept in steps.jsonl."""

    step: int
    """From 1."""
    loss: float
    """Mean over the tokens of the whole global batch."""
    learning_rate: float
    grad_norm: float | None
    epoch: float
    tokens: int
    """Tokens of this step over all ranks, padding left out."""
    seconds: float
    rows: list[int]
    """Rows this rank trained, in order."""
    parts: dict[str, float]
    """Seconds of load, forward, backward, communicate and optimize on this rank, see step_clock.py."""
    gemm_share: float
    """What this rank did of its processor's GEMM peak, see engine/peak.py."""
    busy_s: float | None = None
    """Seconds of this rank's own work: forward and backward pass."""
    waited_s: float | None = None
    """Seconds until the gradients of all ranks were summed after that."""


class Reporter:
    """Sends a rank's events to the launcher; without one, rank 0 prints them."""

    def __init__(self, world: World, env: Mapping[str, str], rank_dir: Path | None) -> None:
        self._world = world
        self._events: TextIO | None = None
        self._sending = threading.Lock()
        self._steps: FileIO | None = None
        self._no_room = False
        self.rank_dir = rank_dir
        self.phases: dict[str, float] = {}
        """Seconds spent in each phase."""
        self._inside: list[str] = []
        if contract.EVENT_FD in env:
            # Ranks start no programs that would need it, and DataLoader workers must not hold it open.
            descriptor = int(env[contract.EVENT_FD])
            os.set_inheritable(descriptor, False)
            self._events = os.fdopen(descriptor, "w", buffering=1)
        if rank_dir is not None:
            rank_dir.mkdir(parents=True, exist_ok=True)
            self._steps = (rank_dir / contract.STEPS_FILE).open("ab", buffering=0)

    def bound(self, cpus: str, threads: int) -> None:
        """Tells the binding that torch sees."""
        self._send({"event": "bound", "cpus": cpus, "threads": threads})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Names what goes on in the block and adds up its time; after it, the phase around it goes on."""
        self._inside.append(name)
        self._send({"event": "phase", "name": name})
        start = time.monotonic()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.monotonic() - start
            self._inside.pop()
            if self._inside:
                self._send({"event": "phase", "name": self._inside[-1]})

    def takes(self, request: str) -> None:
        """From now on this rank understands the signal of a request: "stacks", "save" or "stop"."""
        self._send({"event": "takes", "signal": request})

    def line(self, text: str) -> None:
        """A line for the person watching, told once (by rank 0)."""
        if self._world.is_main:
            self._send({"event": "line", "text": text}, shown=text)

    def step(self, record: StepRecord, *, total: int, eta_s: float, log: bool) -> None:
        """A finished step: kept on disk by every rank, shown from rank 0."""
        self._keep(json.dumps(asdict(record)) + "\n")
        event = {
            "event": "step",
            "step": record.step,
            "total": total,
            "loss": record.loss,
            "lr": record.learning_rate,
            "epoch": record.epoch,
            "tokens_per_s": record.tokens / record.seconds,
            "eta_s": eta_s,
            "gemm_share": record.gemm_share,
            "parts": record.parts,
            "log": log,
            "busy_s": record.busy_s,
            "waited_s": record.waited_s,
        }
        shown = (
            f"step {record.step}/{total}  loss {record.loss:.4f}  learning_rate {record.learning_rate:.3g}  "
            f"epoch {record.epoch:.2f}  {record.gemm_share:.0%} of the GEMM peak"
        )
        self._send(event, shown=shown if log and self._world.is_main else None)

    def _keep(self, record: str) -> None:
        """A disk that is full for a while costs records, which is said, and no step."""
        reason = lines.append(self._steps, record) if self._steps is not None else None
        if reason and not self._no_room:
            self.line(f"{contract.STEPS_FILE} cannot be written: {reason}; training goes on unrecorded")
        self._no_room = bool(reason)

    def checkpoint(self, path: Path, step: int, *, emergency: bool = False) -> None:
        """A checkpoint was committed; ``emergency``: because the launcher asked for it."""
        event = {"event": "checkpoint", "path": str(path), "step": step}
        self._send({**event, "emergency": True} if emergency else event, shown=f"checkpoint {path}")

    def summary(self, told: list[str]) -> None:
        """The closing text."""
        if self._world.is_main:
            self._send({"event": "summary", "lines": told}, shown="\n".join(told))

    def _send(self, event: dict[str, Any], shown: str | None = None) -> None:
        if self._events is not None:
            with self._sending:
                self._events.write(json.dumps(event) + "\n")
        elif shown is not None:
            print(shown, flush=True)
