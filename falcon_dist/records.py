"""Where records come from: JSONL files, hub data sets and packaged text, each record with its place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_dist.config import DataConfig
from falcon_dist.contract import UserError
from falcon_dist.packaged import PREFIX, packaged_text


@dataclass(frozen=True, slots=True)
class Record:
    """One record and where it stands, for errors: ``talks.jsonl:7``."""

    place: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """A readable set of records and the hash of its content."""

    name: str
    path: Path | None
    """The JSONL file, or None for a hub data set."""
    digest: str

    def records(self, config: DataConfig) -> Iterator[Record]:
        """Every record in order, at most config.max_records.

        Raises:
            UserError: a line is no JSON object, or there is no record at all.
        """
        found = _from_jsonl(self.path) if self.path else _from_hub(self.name, config.split)
        count = 0
        for count, record in enumerate(found, start=1):
            if config.max_records is not None and count > config.max_records:
                return
            yield record
        if count == 0:
            raise UserError(f'data.name: no record in "{self.name}"; give a file with one JSON object a line')


def find_source(config: DataConfig) -> Source:
    """The data set that config.name means.

    Raises:
        UserError: there is none.
    """
    if config.name.startswith(PREFIX):
        path = packaged_text(config.name)
        return Source(config.name, path, _file_digest(path))
    if config.name.endswith(".jsonl") or Path(config.name).exists():
        return _file_source(config.name)
    return Source(config.name, None, _hub_digest(config))


def _file_source(name: str) -> Source:
    path = Path(name)
    if not path.is_file():
        raise UserError(f'data.name: no such file: "{name}"; give the path of a .jsonl file')
    if path.suffix != ".jsonl":
        raise UserError(f'data.name: not a .jsonl file: "{name}"; write one JSON object a line')
    return Source(name, path, _file_digest(path))


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _from_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield Record(f"{path}:{number}", _json_object(f"{path}:{number}", line))


def _json_object(place: str, line: bytes) -> Mapping[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        shown = line[:40].decode("utf-8", "replace").strip()
        raise UserError(f'{place}: not a JSON object: "{shown}"; write one object a line')
    return values


def _hub_digest(config: DataConfig) -> str:
    return hashlib.sha256(_hub(config.name, config.split)._fingerprint.encode()).hexdigest()


def _from_hub(name: str, split: str) -> Iterator[Record]:
    for number, values in enumerate(_hub(name, split)):
        yield Record(f"{name}[{number}]", values)


def _hub(name: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        # Missing data sets and a hub out of reach both end here, under several classes.
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f'data.name: cannot load "{name}" (split "{split}"): {first}') from error
