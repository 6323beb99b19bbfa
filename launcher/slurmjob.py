"""LaunchConfig and the words of a command line -> the text of a job script for sbatch. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from falcon_dist.config import parse_value
from launcher.config import LaunchConfig
from launcher.errors import UserError
from launcher.redaction import redact_value

RUN_ID: Final = "slurm-$SLURM_JOB_ID"
_OPTION: Final = re.compile(r"[a-z][a-z0-9-]*(=[^\n]*)?")
_OURS: Final = ("nodes", "ntasks-per-node", "open-mode", "signal", "requeue", "no-requeue")
SCRIPT: Final = """#!/bin/bash
{options}
# In place of this shell, so that Slurm's signals arrive: {signal_s} s before the time is over the launcher
# has all ranks save, asks Slurm to start the job again, and then goes on where it was.
exec {command}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobScript:
    """A job as sbatch takes it."""

    text: str
    notes: tuple[str, ...] = ()
    """What the user should be told about it."""


def render(config: LaunchConfig, launcher: str, words: Sequence[str], program: Sequence[str] = ()) -> JobScript:
    """The script of a job that runs ``launcher`` with these flags, and can be started again and again.

    ``program``: the words after the flags, which are nobody else's business.

    Raises:
        UserError: hosts are named, which Slurm chooses, or a word would put a secret into the script.
    """
    _check(config)
    _check_secrets(words, program, config.slurm.options)
    resumed = "--resume" in words or any(word.startswith("--resume=") for word in words)
    again = [] if resumed else ["--resume", "auto"]
    named = "" if resumed or config.launch.run_id else f' --run-id "{RUN_ID}"'
    words = [*words, *_number(config, words)]
    left_out = [word for key in config.left_out for word in ("--set", f"{key}=none")]
    command = (
        shlex.join([launcher, *words, *left_out, *again]) + named + "".join(f" {shlex.quote(word)}" for word in program)
    )
    options = "\n".join(f"#SBATCH --{option}" for option in _options(config))
    text = SCRIPT.format(options=options, signal_s=config.slurm.signal_s, command=command)
    told = (f"Slurm chooses the hosts: {', '.join(config.left_out)} of the run is left out",) if left_out else ()
    return JobScript(text=text, notes=(*config.notes, *told))


def _number(config: LaunchConfig, words: Sequence[str]) -> list[str]:
    """How many nodes, for a job that would not know it: from the run that it goes on with, say."""
    launch = config.launch
    if launch.nnodes is None or any(_flag_of(word) in ("--nnodes", "--num-nodes") for word in words):
        return []
    return ["--nnodes", str(launch.nnodes) if launch.min_nodes is None else f"{launch.min_nodes}:{launch.nnodes}"]


def _flag_of(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


def _options(config: LaunchConfig) -> list[str]:
    launch, slurm = config.launch, config.slurm
    least, most = launch.min_nodes, launch.nnodes or 1
    given = {"partition": slurm.partition, "time": slurm.time, "account": slurm.account, "qos": slurm.qos}
    lines = [
        f"job-name={slurm.job_name}",
        f"nodes={most if least is None or least == most else f'{least}-{most}'}",
        *([f"ntasks-per-node={launch.nproc_per_node}"] if launch.nproc_per_node else []),
        # Whole nodes, unless it was said how many cpus a rank gets: one for each is what Slurm would give.
        f"cpus-per-task={slurm.cpus_per_task}" if slurm.cpus_per_task else "exclusive",
        *(f"{name}={value}" for name, value in given.items() if value is not None),
        f"output={slurm.output}",
        "open-mode=append",
        f"signal=B:USR1@{slurm.signal_s}",
        "requeue",
    ]
    return [*lines, *slurm.options]


def _check(config: LaunchConfig) -> None:
    launch, slurm = config.launch, config.slurm
    for flag, value in (("--hostfile", launch.hostfile), ("--hosts", launch.hosts)):
        if value is not None:
            raise UserError(f'{flag}: not beside --slurm, where Slurm chooses the nodes: "{value}"; use --nnodes')
    if launch.min_nodes is not None and launch.nnodes is None:
        raise UserError(f'--min-nodes: of how many a job is to have: "{launch.min_nodes}"; add --nnodes N')
    if slurm.signal_s <= launch.stop_grace_s:
        raise UserError(
            f'slurm.signal_s: no longer than launch.stop_grace_s, in which ranks save: "{slurm.signal_s}"; '
            f"make it more than {launch.stop_grace_s:g}"
        )
    for option in slurm.options:
        if not _OPTION.fullmatch(option) or option.partition("=")[0] in _OURS:
            raise UserError(f'--sbatch: not an option that can be given so: "{option}"; form: NAME=VALUE without "--"')


def _check_secrets(words: Sequence[str], program: Sequence[str], options: Sequence[str]) -> None:
    """Of what stands in the script: variables by their names, and logins in addresses anywhere."""
    exported = [part for option in options if option.startswith("export=") for part in option[7:].split(",")]
    for item in (*_variables(words), *exported):
        name, _, value = item.partition("=")
        if value and redact_value(name, value) != value:
            raise UserError(f'--env: a job script is no place for a secret: "{name}"; use --env {name}')
    for word in (*words, *program, *options):
        if (shown := redact_value("", word)) != word:
            raise UserError(f'arguments: a job script is no place for a login: "{shown}"; give it by a variable, --env')


def _variables(words: Sequence[str]) -> Iterator[str]:
    """Every NAME=VALUE that is meant for the ranks."""
    for before, word in pairwise(("", *words)):
        flag, _, text = word.partition("=")
        flag, text = (before, word) if before in ("--env", "--set") else (flag, text)
        key, _, value = text.partition("=")
        if flag == "--env":
            yield text
        elif (flag, key) == ("--set", "launch.env"):
            given = parse_value(value)
            yield from (str(item) for item in given) if isinstance(given, list) else (str(given),)
