"""The run that is gone on with: found by its id, its folder, or "auto", and what its config.json says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from falcon_dist.config import Value, flatten
from launcher.errors import UserError

NAMED: Final = ("launch.hostfile", "launch.hosts")
REPORT: Final = "report.json"
HOSTS: Final = (*NAMED, "launch.include", "launch.exclude")


def find(resume: str, runs: Path, run_id: str | None) -> tuple[Path | None, str | None]:
    """The folder of the run, None for a new one, and what the user should be told.

    "auto" with a run id is that run, whatever it has got to, or a new one of that name: a job that is started again
    and again goes on with its own run and nobody else's. Without an id it is the newest run with a checkpoint.

    Raises:
        UserError: there is no such run.
    """
    if resume != "auto":
        try:
            for folder in (Path(resume), runs / resume):
                if (folder / "config.json").is_file():
                    return folder.absolute(), None
        except OSError as fault:
            raise UserError(f'--resume: cannot be looked at: "{resume}"; {fault.strerror}') from fault
        raise UserError(f'--resume: no such run: "{resume}"; give a run folder, or a run id below {runs}')
    if run_id is not None:
        found = runs / run_id if (runs / run_id / "config.json").is_file() else None
        return _auto(found, f"no run {run_id} in {runs} yet; it starts")
    return _auto(_newest_with_checkpoints(runs), f"no run with a checkpoint in {runs}; a new run starts")


def committed(run: Path) -> list[Path]:
    """The checkpoints of a run; not what a save that was cut off or a resume that refused one has left."""
    return [path for path in run.glob("checkpoints/step-*") if path.name.removeprefix("step-").isdecimal()]


def step_of(checkpoint: Path) -> int:
    """The step of a committed checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint that the run's own reports tell of; 0: none does."""
    return max((_told_step(path) for path in (folder / REPORT, *folder.glob(f"attempt_*/{REPORT}"))), default=0)


def _told_step(report: Path) -> int:
    try:
        return int(json.loads(report.read_text())["checkpoint_step"])
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def settings(folder: Path) -> dict[str, Value]:
    """All settings of a run."""
    values = _read(folder)
    return flatten({**values.get("train", {}), "launch": values.get("launch", {})}, str(folder / "config.json"))


def leave_hosts_out(saved: dict[str, Value]) -> tuple[str, ...]:
    """Takes the hosts of the run out of its settings; the keys that said which."""
    found = tuple(key for key in HOSTS if key in saved and saved[key].value is not None)
    for key in found:
        del saved[key]
    return found


def leave_number_out(saved: dict[str, Value]) -> None:
    """Takes out how many hosts the run had where it names none: those of a job are not there any more."""
    if not any(key in saved and saved[key].value is not None for key in NAMED):
        for key in ("launch.nnodes", "launch.min_nodes"):
            saved.pop(key, None)


def program(folder: Path) -> Mapping[str, Any] | None:
    """The program a run was of, where it was not our own."""
    saved: Mapping[str, Any] | None = _read(folder).get("program")
    return saved


def _auto(found: Path | None, else_: str) -> tuple[Path | None, str]:
    return (found.absolute(), f"resume: {found}") if found else (None, f"resume: {else_}")


def _newest_with_checkpoints(runs: Path) -> Path | None:
    found = [path.parent for path in runs.glob("*/config.json") if committed(path.parent)]
    return max(found, key=lambda run: (run / "checkpoints").stat().st_mtime_ns, default=None)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as fault:
        raise UserError(f"{path}: cannot be read: {fault}") from fault
