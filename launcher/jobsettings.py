"""What a Slurm job of ours asks for: the ``[slurm]`` table of a recipe and the flags beside ``--slurm``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from falcon_dist.config import Value, build
from launcher.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmSettings:
    """What a job script asks Slurm for; the ``[slurm]`` table of a recipe, used with ``--slurm`` only."""

    partition: str | None = None
    time: str | None = None
    """Time limit as sbatch takes it: minutes, or "hours:minutes:seconds"."""
    account: str | None = None
    qos: str | None = None
    cpus_per_task: int | None = None
    """Cpus of each rank; None: whole nodes."""
    job_name: str = "falcon"
    output: str = "slurm-%j.out"
    signal_s: int = 120
    """So many seconds before its end the job is told to make way."""
    options: tuple[str, ...] = ()
    """Further options of sbatch, as "NAME=VALUE" or "NAME"."""


def of(values: Mapping[str, Value]) -> SlurmSettings:
    """The settings among all values of a configuration.

    Raises:
        UserError: a value does not fit.
    """
    settings = build(SlurmSettings, values, "slurm.")
    for key in ("cpus_per_task", "signal_s"):
        number = getattr(settings, key)
        if number is not None and number < 1:
            raise UserError(f'{values[f"slurm.{key}"].source}: slurm.{key} must be 1 or more: "{number}"')
    for key in ("partition", "time", "account", "qos", "job_name", "output"):
        text = getattr(settings, key)
        if text is not None and not re.fullmatch(r"[^\s#]+", text):
            raise UserError(f'{values[f"slurm.{key}"].source}: slurm.{key} must be one word: "{text}"')
    return settings
