"""Checkpoints: their folder, the atomic commit, verification, and which one to resume from.

A checkpoint ``step-000500/`` is what plain transformers loads, and ``train_state/`` beside it, all listed with
size and hash in ``manifest.json``, which ends with a sha256 of its own. It is made in a temporary folder, synced to
disk and renamed: a folder of the final name is complete. Only safetensors and JSON, never pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError

from falcon_dist import digest
from falcon_dist.contract import UserError
from falcon_dist.durable import synchronise
from falcon_dist.tensor_file import Told

MANIFEST: Final = "manifest.json"
TRAIN_STATE: Final = "train_state"
TENSORS: Final = ".safetensors"
NO_STATE: Final = "has no optimizer state; it was saved with checkpoint.optimizer=false"
_PARTIAL: Final = ".partial-"


class DamagedError(Exception):
    """A checkpoint is not as it was written; says in a few words what of it."""


def folder_name(step: int) -> str:
    """500 -> "step-000500"."""
    return f"step-{step:06d}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path
    step: int
    facts: Mapping[str, Any]
    """What the run told of itself when it saved: run_id, world_size, rows digest, ..."""


@contextlib.contextmanager
def committed(root: Path, step: int, facts: Mapping[str, Any], *, anew: bool = False) -> Iterator[Path]:
    """A temporary folder to fill; when the block ends well it becomes the checkpoint of this step, see ``commit``.

    Raises:
        UserError: the disk is full or cannot be written. Older checkpoints stay as they are.
    """
    with written(root / folder_name(step), {"step": step, **facts}, anew=anew, above=False) as partial:
        yield partial


@contextlib.contextmanager
def written(final: Path, facts: Mapping[str, Any], *, anew: bool = False, above: bool = True) -> Iterator[Path]:
    """The same for a folder of any name: it is there whole, with its manifest, or not at all.

    What is ``above`` it may be made as well.
    """
    partial = partial_of(final)
    try:
        if above:
            final.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        yield partial
        commit(partial, final, facts, anew=anew)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f'checkpoint: cannot write "{final}": {reason}; earlier checkpoints are untouched') from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def make(folder: Path) -> None:
    """An empty folder, and the one it is in; not what is above them.

    A run's folder that is gone, as where its file system was unmounted, would be made in another place than it was.
    """
    try:
        folder.mkdir()
    except FileNotFoundError:
        folder.parent.mkdir()
        folder.mkdir()


def partial_of(final: Path, kind: str = "") -> Path:
    """Where a folder is filled before it gets its name; two that are filled at once are of different kinds."""
    return final.with_name(f"{final.name}{_PARTIAL}{kind}{os.getpid()}")


def commit(
    partial: Path, final: Path, facts: Mapping[str, Any], told: Mapping[str, Told] | None = None, *, anew: bool = False
) -> None:
    """Gives a filled folder its manifest and its name; what stands there already is kept if it is whole.

    Not if the run can be gone on with from the new one only.

    Args:
        partial: the folder, its files synchronised or to be.
        final: its name.
        facts: what the run tells of itself.
        told: files that were hashed and synchronised while they were written, by name in the folder.
        anew: what stands there, whole or not, was refused when the run was resumed.
    """
    _write_manifest(partial, facts, told or {})
    if not anew and fault_of(final) is None and holds_state(final) >= holds_state(partial):
        return  # a rank that was asked for this step in an emergency came first
    if final.exists():
        final.rename(final.with_name(f"{final.name}.refused-{os.getpid()}-{secrets.token_hex(2)}"))
    partial.rename(final)
    synchronise(final.parent)


def _write_manifest(folder: Path, facts: Mapping[str, Any], told: Mapping[str, Told]) -> None:
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    files = {name: entry(told[name] if name in told else _synchronised(folder / name)) for name in names}
    if missing := set(told) - set(files):
        raise FileNotFoundError(errno.ENOENT, f"{min(missing)} has gone", str(folder))
    for sub in {folder, *(f for f in folder.rglob("*") if f.is_dir())}:
        synchronise(sub)
    path = folder / MANIFEST
    path.write_text(manifest_text(facts, files))
    synchronise(path)
    synchronise(folder)


def manifest_text(facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> str:
    """What a checkpoint tells of its run and of every file, under a sha256 of that; Pure."""
    told = json.loads(json.dumps({"facts": facts, "files": files}))
    own = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    return json.dumps({**told, "sha256": own}, indent=1, sort_keys=True) + "\n"


def entry(told: Told) -> dict[str, Any]:
    """A file in a manifest: {"bytes": 1024, "blake3": "..."}; Pure."""
    return {"bytes": told.bytes, told.kind: told.hash}


def _told(values: Mapping[str, Any]) -> Told:
    """Of an entry; raises ValueError or KeyError for anything else."""
    (kind,) = values.keys() - {"bytes"}
    digest.hasher(kind)
    return Told(values["bytes"], values[kind], kind)


def _synchronised(path: Path) -> Told:
    synchronise(path)
    return told_of(path)


def told_of(path: Path, kind: str = digest.KIND) -> Told:
    """A file as it is."""
    return Told(path.stat().st_size, digest.of_file(path, kind), kind)


def read_manifest(path: Path) -> tuple[dict[str, Any], dict[str, Told]]:
    """What a checkpoint tells of its run, and of each of its files.

    Raises:
        DamagedError: its manifest is not what was written.
    """
    try:
        text = (path / MANIFEST).read_bytes()
        manifest = json.loads(text)
        facts, files = manifest["facts"], manifest["files"]
        if text != manifest_text(facts, files).encode() or not isinstance(facts["step"], int):
            raise DamagedError(f"{MANIFEST} is damaged")
        return facts, {name: _told(told) for name, told in files.items()}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DamagedError(f"{MANIFEST} is missing") from error
    except OSError as error:
        raise DamagedError(unreadable(MANIFEST, error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{MANIFEST} is damaged") from error


def holds_state(path: Path) -> bool:
    """Whether a whole checkpoint has the optimizer's state, without which no run goes on."""
    return any(name.startswith(f"{TRAIN_STATE}/") for name in read_manifest(path)[1])


def fault_of(path: Path, *, tensors: bool = True) -> str | None:
    """Why this checkpoint cannot be trusted, in a few words, or None where every byte is as it was written.

    Args:
        path: its folder.
        tensors: hash the files of tensors too. Who reads them next does that on the way, see train_state.load.
    """
    try:
        files = read_manifest(path)[1]
    except DamagedError as error:
        return str(error)
    faults = (file_fault(path, name, told, tensors or not name.endswith(TENSORS)) for name, told in files.items())
    return next(filter(None, faults), None)


def file_fault(folder: Path, name: str, told: Told, hashed: bool = True) -> str | None:
    """Why a file of a checkpoint is not what was written, by its size and, where asked for, its hash."""
    file = folder / name
    try:
        if (size := file.stat().st_size) != told.bytes:
            return f"{name} has {size} bytes, not {told.bytes}"
        if hashed and digest.of_file(file, told.kind) != told.hash:
            return other_bytes(name, told)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"{name} is missing"
    except OSError as error:
        return unreadable(name, error)
    return None


def unreadable(name: str, error: OSError) -> str:
    """What is said of a file that the disk does not give."""
    return f"{name} cannot be read: {error.strerror or error}"


def other_bytes(name: str, told: Told) -> str:
    """What is said of a file whose size is right."""
    return f"{name} is not what was written ({told.kind} differs)"


@dataclass(frozen=True, slots=True)
class Choice:
    """The checkpoint to resume from and the newer ones that were refused, each with its reason."""

    newest: Checkpoint | None
    refused: tuple[tuple[Path, str], ...]


def newest_verified(root: Path, *, below: int | None = None, tensors: bool = True, with_state: bool = False) -> Choice:
    """The newest checkpoint that verifies; newer ones that do not are told.

    Args:
        root: folder of checkpoints.
        below: only those of earlier steps.
        tensors: as in ``fault_of``.
        with_state: only those from which a run can go on.
    """
    refused: list[tuple[Path, str]] = []
    names = {path: path.name.removeprefix("step-") for path in root.glob("step-*")}
    steps = {int(name): path for path, name in names.items() if name.isdecimal()}
    for step, path in sorted(steps.items(), reverse=True):
        if below is not None and step >= below:
            continue
        fault = fault_of(path, tensors=tensors)
        if fault is None and with_state and not holds_state(path):
            fault = NO_STATE
        if fault is None:
            return Choice(read(path), tuple(refused))
        refused.append((path, fault))
    return Choice(None, tuple(refused))


def read(path: Path) -> Checkpoint:
    """A committed checkpoint by its folder; its files' bytes are not verified here.

    Raises:
        DamagedError: its manifest is not what was written.
    """
    facts = read_manifest(path)[0]
    return Checkpoint(path, facts["step"], facts)


def clear_partial(root: Path) -> None:
    """Removes what a killed save left behind in this run's own folder."""
    for path in root.glob(f"step-*{_PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def check_room(folder: Path, needed: int) -> None:
    """Looks before anything is written whether so many bytes can be.

    Raises:
        OSError: they cannot; tells how many there are.
    """
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if stats.f_blocks and free < needed:  # a file system that does not tell its size has 0 blocks
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {_size(needed)} needed, {_size(free)} free")


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"
