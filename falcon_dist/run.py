"""One run as every part of the rank's program sees it, and what it tells of itself at start and end."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from falcon_dist.config import TrainConfig
from falcon_dist.evaluate import HeldOut
from falcon_dist.metrics import Reporter
from falcon_dist.order import Schedule
from falcon_dist.prepare import Prepared
from falcon_dist.rows import PackedStore
from falcon_dist.strategy.memory import RankMemory
from falcon_dist.strategy.replicated import Replicated
from falcon_dist.world import World

MANY_SUMMED: Final = 64
"""Micro-batches whose gradients' sum in bf16 is off by 0.8%, and with more by ever more (docs/engine.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Settings, place, ranks, data and schedule of one run."""

    config: TrainConfig
    folder: Path
    world: World
    prepared: Prepared
    store: PackedStore
    schedule: Schedule
    reporter: Reporter
    strategy: Replicated
    identity: Mapping[str, str]
    """Digests of what the run is made of as it starts, see identity.py."""

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def run_facts(run: Run) -> dict[str, Any]:
    """What a checkpoint tells of the run that made it."""
    return {
        "run_id": run.folder.name,
        "rows": run.store.digest.hex(),
        "world_size": run.world.world_size,
        "global_batch": run.schedule.global_batch,
        "total_steps": run.schedule.total_steps,
        "seed": run.config.seed,
        "precision": run.config.precision,
        "strategy": run.config.strategy,
        **{f"optim.{name}": value for name, value in asdict(run.config.optim).items()},
        **({"lora.dropout": run.config.lora.dropout} if run.config.strategy == "lora" else {}),
        **run.identity,
    }


def opening_lines(run: Run, memory: RankMemory) -> list[str]:
    """The arithmetic of the run and what a rank will hold, told before anything is loaded."""
    s = run.schedule
    seen = f", {s.unseen_rows:,} rows never trained" if s.unseen_rows else ""
    return [
        f"{s.num_rows:,} training rows and {len(run.store.evaluation):,} held-out rows, "
        f"{run.config.data.max_length} tokens each",
        f"batch: {s.micro_batch} rows x {s.grad_accum} accumulated x {s.world_size} ranks = {s.global_batch} rows a "
        f"step; {s.total_steps:,} steps = {s.total_rows:,} rows ({s.epoch_at(s.total_steps):.2f} epochs), "
        f"{s.padding_rows} padding rows{seen}",
        f"memory per rank, at most about: {memory.text()} ({run.config.strategy}, {run.config.precision})",
        *_note_of_sums(run),
    ]


def _note_of_sums(run: Run) -> list[str]:
    if run.config.precision != "bf16" or run.schedule.grad_accum <= MANY_SUMMED:
        return []
    summed = f"gradients of {run.schedule.grad_accum} micro-batches are summed in bf16, which loses digits"
    return [f"loop.grad_accum: {summed}; a larger loop.micro_batch, or more ranks, need fewer"]


def closing_lines(before: dict[str, Any], after: dict[str, Any], saved: Path) -> list[str]:
    """The run's result for a person."""
    lines = []
    for name, figures in (("base", before), ("tuned", after)):
        if "held_out" in figures:
            lines.append(f"held-out, {name + ':':6} {HeldOut.from_dict(figures['held_out'])}")
    for prompt in after.get("answers", ()):
        lines.append(f"prompt: {prompt}")
        for name, figures in (("base", before), ("tuned", after)):
            with suppress(KeyError):
                lines.append(f"  {name + ':':6} {figures['answers'][prompt]}")
    lines.append(f"chat with it: {_command('falcon')} chat {_shown(saved)}")
    return lines


def _command(name: str) -> str:
    """How a person starts one of our commands from here: by name where PATH has it, else by its place."""
    beside = Path(sys.executable).parent / name
    return name if shutil.which(name) or not beside.is_file() else _shown(beside)


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
