"""Checkpoints written while training goes on: each rank copies its share of the state, and a thread writes the copy.

Rank 0 makes the folder and commits it when every share is written. One save at a time: the next one begins when the
one before is committed or has failed, on all ranks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from falcon_dist import checkpoint, tensor_file, train_state
from falcon_dist.layout import Shard
from falcon_dist.team import SaveError, Team
from falcon_dist.tensor_file import Told

NICE: Final = 5
"""The writing thread gives way to those that compute."""
LONGEST_S: Final = 1800.0
"""A save that takes longer never ends: the storage does not answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One rank's part of one checkpoint."""

    root: Path
    step: int
    total_bytes: int
    """Of the tensors of all ranks."""
    shards: tuple[Shard, ...]
    """This rank's."""
    tensors: Mapping[str, torch.Tensor]
    """What is in them; nothing else changes these."""
    write_rest: Callable[[Path], None]
    """Writes what is beside the tensors; done by rank 0."""
    facts: Mapping[str, Any]
    anew: bool = False
    """A whole checkpoint of this step that stands there already is not the run's own."""


def write_job(job: Job, team: Team) -> None:
    """Writes this rank's part and waits until the checkpoint is committed.

    Raises:
        SaveError: a rank could not write its part; nothing of this checkpoint is left.
    """
    name = str(job.step)
    if team.leads:
        fault = _fault_of(lambda: _lead(job, team))
        team.tell(name, "done", {"fault": fault} if fault else {})
        if fault:
            raise SaveError(fault)
    elif team.rank in team.writers:  # also without a file of its own: every writer's part is waited for
        fault = _fault_of(lambda: _contribute(job, team))
        if fault:
            team.tell(name, f"part-{team.rank}", {"fault": f"rank {team.rank}: {fault}"})
    team.hear(name, "done")


def _lead(job: Job, team: Team) -> None:
    final = job.root / checkpoint.folder_name(job.step)
    folder = checkpoint.partial_of(final, "shared")
    try:
        checkpoint.make(folder)
        checkpoint.check_room(folder, job.total_bytes)
        team.tell(str(job.step), "folder", folder.name)
        told: dict[str, Told] = {}
        # All parts are waited for, also after a fault: nobody may write any more when the folder is removed.
        faults = [_fault_of(lambda: told.update(_own_part(job, folder)))]
        for rank in team.writers[1:]:
            faults.append(_fault_of(partial(_take_part, told, rank, job, team)))
        if fault := next(filter(None, faults), None):
            raise SaveError(fault)
        checkpoint.commit(folder, final, {"step": job.step, **job.facts}, told, anew=job.anew)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _own_part(job: Job, folder: Path) -> dict[str, Told]:
    told = train_state.write_shards(folder, job.shards, job.tensors)
    job.write_rest(folder)
    return told


def _take_part(told: dict[str, Told], rank: int, job: Job, team: Team) -> None:
    part = team.hear(str(job.step), f"part-{rank}")
    told |= {name: Told(*values) for name, values in part.items()}


def _contribute(job: Job, team: Team) -> None:
    name = str(team.hear(str(job.step), "folder"))
    # Whoever reaches the store can write there: nobody is led out of the run's folder.
    if Path(name).name != name or not name.startswith(checkpoint.folder_name(job.step)):
        raise SaveError(f'"{name}" is no folder for the save of step {job.step}')
    told = train_state.write_shards(job.root / name, job.shards, job.tensors)
    team.tell(str(job.step), f"part-{team.rank}", {name: list(one) for name, one in told.items()})


def _fault_of(work: Callable[[], None]) -> str | None:
    """Why the work could not be done, or None."""
    try:
        work()
    except SaveError as fault:
        return str(fault)
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # noqa: BLE001 - a thread's last words would be lost, and its peers wait for them
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


class Copies:
    """This rank's share of the state in memory of its own, which every save uses again."""

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The tensors as they are now."""
        if {name: t.shape for name, t in self._copies.items()} != {name: t.shape for name, t in tensors.items()}:
            self._copies = tensor_file.empty({name: (t.shape, t.dtype) for name, t in tensors.items()})
        if tensors:
            torch._foreach_copy_(list(self._copies.values()), [tensor.detach() for tensor in tensors.values()])
        return self._copies


class Writer:
    """The thread that writes, if there is one."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._thread: threading.Thread | None = None
        self._fault: str | None = None

    def begin(self, job: Job, then: Callable[[str | None], None]) -> None:
        """Starts to write; ``then`` is called in the thread, with what went wrong or None."""
        assert self._thread is None, "one save at a time"
        self._thread = threading.Thread(target=self._work, args=(job, then), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self, patience_s: float = LONGEST_S) -> str | None:
        """Waits for the save that is under way; what went wrong, or None.

        Raises:
            RuntimeError: it does not end.
        """
        if self._thread is None:
            return None
        self._thread.join(patience_s)
        if self._thread.is_alive():
            raise RuntimeError(f"checkpoint: not written after {patience_s:g} s; the storage does not answer")
        self._thread = None
        return self._fault

    def _work(self, job: Job, then: Callable[[str | None], None]) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        self._fault = _fault_of(lambda: write_job(job, self._team))
        after = _fault_of(lambda: then(self._fault))
        self._fault = self._fault or after
