"""The packed store: fixed rows on disk, mapped into memory, under one manifest hash.

A store is a folder: {train,eval}/{tokens,records,mask}.bin, manifest.json, and skipped.jsonl where records were
left out. Arrays are raw little-endian [rows, max_length]: tokens and records int32, mask uint8.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from falcon_dist.contract import UserError
from falcon_dist.durable import synchronise
from falcon_dist.packing import NO_RECORD, Row, learned_of

MANIFEST: Final = "manifest.json"
ARRAYS: Final[Mapping[str, str]] = {"tokens": "<i4", "records": "<i4", "mask": "|u1"}
IGNORED: Final = -100
"""Label of a position without loss, torch's cross_entropy default."""
_TORN: Final = (ValueError, KeyError, TypeError, AttributeError)
"""What is raised for a manifest that is empty, cut off or of another form."""


@dataclass(frozen=True, slots=True)
class Part:
    """One side of the split, mapped: arrays are [rows, max_length]."""

    tokens: npt.NDArray[np.int32]
    records: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """Rows by number -> input_ids, records, labels, each [B, T] int64; a negative number is a row of nothing.

        A label is the token itself, IGNORED where it is not learned.
        """
        picked = np.asarray(rows)
        tokens, records = self.tokens[picked].astype(np.int64), self.records[picked].astype(np.int64)
        learned = learned_of(records, self.mask[picked])
        learned[picked < 0] = False
        records[picked < 0] = NO_RECORD
        labels = np.where(learned, tokens, IGNORED)
        return {
            "input_ids": torch.from_numpy(tokens),
            "records": torch.from_numpy(records),
            "labels": torch.from_numpy(labels),
        }

    def first(self, count: int) -> Part:
        """Its first rows, all where it has no more."""
        return Part(self.tokens[:count], self.records[:count], self.mask[:count])

    def learns(self) -> bool:
        """Whether any token of it is learned."""
        return bool(learned_of(self.records, self.mask).any())

    def count_tokens(self, rows: list[int]) -> int:
        """Tokens in these rows, padding left out."""
        return int((self.records[[row for row in rows if row >= 0]] != NO_RECORD).sum())


NO_ROWS: Final = Part(np.zeros((0, 1), np.int32), np.zeros((0, 1), np.int32), np.zeros((0, 1), np.uint8))


@dataclass(frozen=True, slots=True)
class PackedStore:
    """A whole store: both parts and what the manifest says of them."""

    path: Path
    train: Part
    evaluation: Part
    facts: Mapping[str, Any]
    """Counts and settings, as written by ``write_store``."""
    digest: bytes
    """sha256 over those of the rows' files; the same however the data was named when they were packed."""
    of_manifest: bytes
    """sha256 of the manifest, by which older checkpoints know the rows."""

    @classmethod
    def open(cls, path: Path) -> PackedStore:
        """Maps a committed store.

        Raises:
            UserError: it is missing, its manifest is torn, or a file has not the size that the manifest tells.
        """
        try:
            text = (path / MANIFEST).read_bytes()
        except OSError as error:
            raise UserError(f'packed rows: no manifest in "{path}"; run falcon-launch again to prepare them') from error
        try:
            manifest = json.loads(text)
            parts = [_map_part(path / name, manifest) for name in ("train", "eval")]
            rows = json.dumps([manifest["facts"]["max_length"], manifest["files"]], sort_keys=True).encode()
        except _TORN as error:
            raise _damaged(path / MANIFEST, path) from error
        digests = (hashlib.sha256(told).digest() for told in (rows, text))
        return cls(path, parts[0], parts[1], manifest["facts"], *digests)


def damaged_file(path: Path) -> str | None:
    """The first file of a committed store whose bytes are not those that its manifest tells; None: all are.

    Every byte is read, which a host does once before its ranks start.
    """
    try:
        for name, told in json.loads((path / MANIFEST).read_bytes())["files"].items():
            if _sha256(path / name) != told["sha256"]:
                return str(name)
    except (OSError, *_TORN):
        return MANIFEST
    return None


def check_whole(path: Path) -> None:
    """Raises UserError for a committed store of which a byte is not what was written."""
    if name := damaged_file(path):
        raise _damaged(path / name, path)


def _sha256(path: Path) -> str | None:
    """Hex; None: it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _damaged(file: Path, store: Path) -> UserError:
    return UserError(f'packed rows: "{file}" is damaged; delete "{store}" and start again')


def _map_part(folder: Path, manifest: Mapping[str, Any]) -> Part:
    length = manifest["facts"]["max_length"]
    arrays = []
    for name, kind in ARRAYS.items():
        file = folder / f"{name}.bin"
        told = manifest["files"][f"{folder.name}/{name}.bin"]["bytes"]
        if not file.is_file() or file.stat().st_size != told:
            raise _damaged(file, folder.parent)
        shape = (told // np.dtype(kind).itemsize // length, length)
        arrays.append(np.memmap(file, kind, "r", shape=shape) if told else np.empty((0, length), kind))
    return Part(*arrays)


def write_store(path: Path, fill: Callable[[Parts], Mapping[str, Any]]) -> None:
    """Makes a store at ``path`` whole or not at all; ``fill`` writes the rows and returns the facts.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with PartWriter(partial / "train") as train, PartWriter(partial / "eval") as evaluation:
            facts = fill({"train": train, "eval": evaluation})
        files = {f"{w.folder.name}/{name}": told for w in (train, evaluation) for name, told in w.told.items()}
        manifest = json.dumps({"facts": facts, "files": files}, indent=1, sort_keys=True)
        with writing(path.parent):
            (partial / MANIFEST).write_text(manifest + "\n")
            _synchronise(partial)
            _publish(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises UserError where the disk of the stores' folder takes no more, or nobody may write there."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f'packed rows: cannot write in "{folder}": {error.strerror or error}; make room there, or set '
            "$XDG_CACHE_HOME to a folder on another disk"
        ) from error


def _synchronise(folder: Path) -> None:
    """Before a folder gets its name: a host that goes down after that must not leave it with empty files."""
    for path in (*folder.rglob("*"), folder):
        synchronise(path)


def _publish(partial: Path, path: Path) -> None:
    try:
        partial.rename(path)
    except OSError:
        # Another run made the same store meanwhile; its bytes are ours, for the name is a hash of all inputs.
        if not (path / MANIFEST).is_file():
            raise


class PartWriter:
    """Appends rows to one part's files, hashing them on the way."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stores = folder.parents[1]
        self.told: dict[str, dict[str, Any]] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._hashes = {name: hashlib.sha256() for name in ARRAYS}

    def __enter__(self) -> PartWriter:
        with writing(self._stores):
            self.folder.mkdir(parents=True)
            self._files = {name: (self.folder / f"{name}.bin").open("wb") for name in ARRAYS}
        return self

    def write(self, rows: Iterable[Row]) -> None:
        """Appends rows in order."""
        for row in rows:
            for name, kind in ARRAYS.items():
                data = getattr(row, name).astype(kind).tobytes()
                with writing(self._stores):
                    self._files[name].write(data)
                self._hashes[name].update(data)

    def __exit__(self, *_: object) -> None:
        for name, file in self._files.items():
            with writing(self._stores):
                size = file.tell()
                file.close()
            self.told[f"{name}.bin"] = {"bytes": size, "sha256": self._hashes[name].hexdigest()}


Parts = Mapping[str, PartWriter]
"""Writers of a store's two parts, by name."""
