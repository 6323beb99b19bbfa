"""Checkpoints of a divided state: rank 0 writes while all ranks wait and give their parts, which it gathers.

A rank that left the others alone in a gather would hang them. So before the first one rank 0 tells whether it can write
at all, and where writing fails later it goes on to gather what is left, see ``strategy/zero.py``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from falcon_dist import checkpoint
from falcon_dist.team import SaveError, Team


def save(
    team: Team,
    final: Path,
    facts: Mapping[str, Any],
    *,
    total_bytes: int,
    give: Callable[[Path | None], None],
    anew: bool = False,
) -> str | None:
    """Writes a checkpoint; what went wrong in rank 0's words, or None. To be called by all ranks.

    Args:
        team: all ranks.
        final: the checkpoint's folder.
        facts: what the run tells of itself, with "step".
        total_bytes: of the tensors of all ranks.
        give: takes part in every gather; on rank 0 writes what it gathers into a folder.
        anew: a whole checkpoint that stands there already is not the run's own.
    """
    name = str(facts["step"])
    if team.leads:
        fault = _fault_of(lambda: _lead(team, final, facts, total_bytes, give, anew=anew))
        team.tell(name, "done", {"fault": fault} if fault else {})
        return fault
    try:
        team.hear(name, "folder")
        give(None)
        team.hear(name, "done")
    except SaveError as error:
        return str(error)
    return None


def _lead(
    team: Team,
    final: Path,
    facts: Mapping[str, Any],
    total_bytes: int,
    give: Callable[[Path | None], None],
    *,
    anew: bool,
) -> None:
    folder = checkpoint.partial_of(final, "shared")
    try:
        checkpoint.make(folder)
        checkpoint.check_room(folder, total_bytes)
        team.tell(str(facts["step"]), "folder", folder.name)
        give(folder)
        checkpoint.commit(folder, final, facts, anew=anew)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fault_of(work: Callable[[], None]) -> str | None:
    """What the disk said, or None; anything else is no fault of the save, and ends the run."""
    try:
        work()
    except (OSError, SafetensorError) as error:
        return getattr(error, "strerror", None) or str(error)
    except Exception as error:
        if type(error) is not Exception:  # tokenizers has no other words for a full disk
            raise
        return str(error)
    return None
