"""What a recipe and flags say about starting ranks: the ``[launch]`` table. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from falcon_dist.config import Value, build
from falcon_dist.contract import EMERGENCY_GRACE_S
from launcher.errors import UserError
from launcher.patience import LEAST_S, STOP_GRACE_S

Backend = Literal["auto", "gloo", "ccl", "ccl-intel"]
NPROC_WORDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "auto": {"by_slots": True},
    "numa": {"by_slots": False, "ranks_per": "numa_node"},
    "socket": {"by_slots": False, "ranks_per": "socket"},
}
"""What may stand for a number of ranks, and what it means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchSettings:
    """How ranks are started; the ``[launch]`` table of a recipe."""

    hostfile: str | None = None
    """File of the run's hosts; None: this machine alone."""
    hosts: str | None = None
    """The same as a list: "a,b:2,node[1-3]"."""
    include: str | None = None
    exclude: str | None = None
    nnodes: int | None = None
    """The first so many hosts; None: all. "MIN:MAX" also sets min_nodes."""
    min_nodes: int | None = None
    """With fewer hosts than there were a run goes on down to so many, once a host failed twice; None: with all only."""
    max_restarts: int = 0
    """How often a run that failed is started again, from its newest checkpoint that verifies."""
    hang_s: float = LEAST_S
    """A step is overdue after so many seconds, or five times the usual if that is longer; 0: never."""
    emergency_grace_s: float = EMERGENCY_GRACE_S
    """Seconds a surviving rank gets to save the last finished step when another one has failed; 0: none."""
    stop_grace_s: float = STOP_GRACE_S
    """Seconds ranks get to end the step they are in and to save when SIGUSR1 asks the launcher to make way."""
    max_requeues: int = 20
    """How often a Slurm job that had to make way asks to be started again."""
    nproc_per_node: int | None = None
    """Ranks on each node; None (written "auto"): its slots, or one for each ``ranks_per``."""
    ranks_per: Literal["numa_node", "socket"] = "numa_node"
    by_slots: bool = True
    """False (nproc_per_node is "numa" or "socket"): one for each ``ranks_per``; slots only say how many at most."""
    sockets: str | None = None
    """Use these sockets of each node only, as "0"."""
    numa_nodes: str | None = None
    """Use these NUMA nodes only, as "0-1"."""
    cores_list: str | None = None
    """Use these cpus only, as "0-27"."""
    ncores_per_rank: int | None = None
    """Compute cores of each rank; None: as many as there are."""
    use_logical_cores: bool = False
    """Ranks get all threads of their cores."""
    ccl_worker_count: int = 0
    """Cores of each rank kept free for oneCCL's workers."""
    memory_allocator: Literal["default", "tcmalloc", "jemalloc"] = "default"
    runs_dir: str = "runs"
    """Folder of all run folders."""
    run_id: str | None = None
    """Name of this run's folder; None: made from the time."""
    backend: Backend = "auto"
    """Collective backend of our own program; ccl-intel: oneccl_bindings_for_pytorch, where it is installed."""
    env: tuple[str, ...] = ()
    """NAME=VALUE, or NAME to take the value from the launcher's environment."""


def of(values: Mapping[str, Value]) -> LaunchSettings:
    """The settings among all values of a configuration.

    Raises:
        UserError: a value does not fit, or not beside another one.
    """
    settings = build(LaunchSettings, {**values, **_in_words(values), **_range_of_nodes(values)}, "launch.")
    _check(settings, values)
    return settings


def _in_words(values: Mapping[str, Value]) -> dict[str, Value]:
    """What a number of ranks given as a word means."""
    given = values.get("launch.nproc_per_node")
    if given is None or not isinstance(given.value, str) or given.value == "none":
        return {}
    if given.value not in NPROC_WORDS:
        known = ", ".join(f'"{word}"' for word in NPROC_WORDS)
        raise UserError(f'{given.source}: launch.nproc_per_node must be a number or {known}: "{given.value}"')
    meant = {"nproc_per_node": None, **NPROC_WORDS[given.value]}
    return {f"launch.{key}": Value(value, given.source) for key, value in meant.items()}


def _range_of_nodes(values: Mapping[str, Value]) -> dict[str, Value]:
    """What torchrun's ``--nnodes MIN:MAX`` means."""
    given = values.get("launch.nnodes")
    if given is None or not isinstance(given.value, str):
        return {}
    least, colon, most = given.value.partition(":")
    if not (colon and least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise UserError(f'{given.source}: launch.nnodes must be a number or MIN:MAX: "{given.value}"')
    return {"launch.nnodes": Value(int(most), given.source), "launch.min_nodes": Value(int(least), given.source)}


def _check(settings: LaunchSettings, values: Mapping[str, Value]) -> None:
    if settings.nproc_per_node is not None and settings.nproc_per_node < 1:
        source = values["launch.nproc_per_node"].source
        raise UserError(f'{source}: launch.nproc_per_node must be "auto" or 1 or more: "{settings.nproc_per_node}"')
    if settings.nnodes is not None and (settings.min_nodes or 0) > settings.nnodes:
        source = values["launch.min_nodes"].source
        text = f'{source}: launch.min_nodes is more than the hosts, {settings.nnodes}: "{settings.min_nodes}"'
        raise UserError(f"{text}; give a lower --min-nodes")
    least_of = {"ncores_per_rank": 1, "ccl_worker_count": 0, "max_restarts": 0, "min_nodes": 1, "hang_s": 0}
    for key, least in {**least_of, "emergency_grace_s": 0, "stop_grace_s": 0, "max_requeues": 0}.items():
        number = getattr(settings, key)
        if number is not None and not least <= number < math.inf:
            raise UserError(f'{values[f"launch.{key}"].source}: launch.{key} must be {least} or more: "{number}"')
    if settings.hostfile is not None and settings.hosts is not None:
        raise UserError(f'--hostfile: not beside --hosts: "{settings.hostfile}"; give one of the two')
    if settings.run_id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", settings.run_id):
        source = values["launch.run_id"].source
        raise UserError(
            f'{source}: launch.run_id names a folder: "{settings.run_id}"; use letters, digits, ".", "_", "-"'
        )
