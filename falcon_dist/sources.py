"""Where records come from: local files and folders, hub data sets, packaged text; and several of them mixed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from falcon_dist.config import DataConfig, MixUntil
from falcon_dist.contract import UserError
from falcon_dist.packaged import DEBIAN, PREFIX, packaged_text
from falcon_dist.readers import READERS, Item, kind_of, read_file
from falcon_dist.records import Record


class _Asked(NamedTuple):
    """A data set as it was asked for."""

    key: str
    """The setting that names it."""
    name: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Source:
    """A readable set of records and the hash of its content."""

    name: str
    digest: str
    read: Callable[[], Iterator[Item]]
    """Begins again from the first record at each call."""
    weight: float = 1.0
    key: str = "data.name"
    """The setting that names it."""

    def items(self) -> Iterator[Item]:
        """Every record in order.

        Raises:
            UserError: there is none at all.
        """
        item = None
        for item in self.read():
            yield item
        if item is None:
            raise UserError(f'{self.key}: no record in "{self.name}"; give a file with one JSON object a line')


def find_sources(config: DataConfig) -> list[Source]:
    """The data sets that are trained on, weighted.

    Raises:
        UserError: one of them does not exist, or data.mix is not of its form.
    """
    asked = [_Asked("data.mix", *_weighted(item)) for item in config.mix] or [_Asked("data.name", config.name)]
    return [_find(one, config) for one in asked]


def trained_on(config: DataConfig) -> tuple[str, ...]:
    """Names of the data sets that are trained on: those of a mix stand in for data.name."""
    return tuple(item.rpartition("=")[0] for item in config.mix) or (config.name,)


def find_eval_source(config: DataConfig) -> Source | None:
    """The data set that is only evaluated on, where there is one of its own."""
    return _find(_Asked("data.eval_name", config.eval_name), config) if config.eval_name else None


def _weighted(item: str) -> tuple[str, float]:
    name, _, text = item.rpartition("=")
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not name or not 0 < weight < float("inf"):
        raise UserError(f'data.mix: not of the form NAME=WEIGHT with a weight above 0: "{item}"')
    return name, weight


def mixed(sources: Sequence[Source], until: MixUntil) -> Iterator[tuple[int, int, Item]]:
    """(number of the source, number of the record in it, the record), in proportion to the weights.

    The source that is furthest behind its share comes next, so that every stretch has the proportions of the
    whole. A record that comes again has the same number again.
    """
    streams = [enumerate(source.items()) for source in sources]
    taken = [0] * len(sources)
    ended: set[int] = set()
    while True:
        due = min(range(len(sources)), key=lambda i: (taken[i] + 1) / sources[i].weight)
        found = next(streams[due], None)
        if found is None:
            ended.add(due)
            if until == "first" or len(ended) == len(sources):
                return
            streams[due] = enumerate(sources[due].items())
            continue
        taken[due] += 1
        yield due, *found


def _find(asked: _Asked, config: DataConfig) -> Source:
    name, path = asked.name, Path(asked.name).expanduser()
    if name.startswith((PREFIX, DEBIAN)):
        return _files_source(asked, [packaged_text(name)], config)
    if path.is_dir():
        return _folder_source(asked, path, config)
    if path.is_file():
        return _files_source(asked, [path], config)
    if any(sign in name for sign in "*?["):
        return _files_source(asked, sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))), config)
    if kind_of(path) in READERS or name.startswith((".", "/", "~")):
        raise UserError(f'{asked.key}: no such file: "{name}"; give the path of a file or folder, or a hub name')
    return _hub_source(asked, config)


def _files_source(asked: _Asked, paths: list[Path], config: DataConfig) -> Source:
    known = [path for path in paths if kind_of(path) in READERS]
    if not known:
        raise UserError(
            f'{asked.key}: no file to read in "{asked.name}"; known formats: {", ".join(READERS)}, each also as .gz'
        )

    def read() -> Iterator[Item]:
        for path in known:
            yield from read_file(path, config.text_by)

    return Source(asked.name, _digest(known), read, asked.weight, asked.key)


def _folder_source(asked: _Asked, path: Path, config: DataConfig) -> Source:
    """A folder that ``datasets`` saved, or one with data files in it."""
    if not any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        found = sorted(p for p in path.iterdir() if p.is_file())
        return _files_source(asked._replace(name=str(path)), found, config)

    def read() -> Iterator[Item]:
        return _numbered(str(path), _from_disk(asked.key, path, config.split))

    told = f"{config.split} {_digest(sorted(p for p in path.rglob('*') if p.is_file()))}"
    return Source(str(path), hashlib.sha256(told.encode()).hexdigest(), read, asked.weight, asked.key)


def _from_disk(key: str, path: Path, split: str) -> Any:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f'{key}: cannot load "{path}": {_first_line(error)}') from error
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise UserError(f'data.split: no such split in "{path}": "{split}"; it has {", ".join(found)}')
    return found[split]


def _digest(paths: list[Path]) -> str:
    """sha256 over the files' formats and bytes, in order."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(kind_of(path).encode())
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _hub_source(asked: _Asked, config: DataConfig) -> Source:
    import datasets

    name = asked.name
    try:
        if config.streaming:
            builder = datasets.load_dataset_builder(name, config.subset, revision=config.revision)
            rows = builder.as_streaming_dataset(split=config.split)
            # Content is not there to be hashed: the builder's hash stands for the commit it will read.
            told = f"{name}/{builder.config.name}/{config.split}/{builder.hash}"
        else:
            rows = datasets.load_dataset(name, config.subset, split=config.split, revision=config.revision)
            told = rows._fingerprint
    except (OSError, ValueError) as error:
        # Missing data sets and a hub out of reach both end here, under several classes.
        raise UserError(f'{asked.key}: cannot load "{name}" (split "{config.split}"): {_first_line(error)}') from error
    digest = hashlib.sha256(told.encode()).hexdigest()
    return Source(name, digest, lambda: _numbered(name, rows), asked.weight, asked.key)


def _numbered(name: str, rows: Any) -> Iterator[Item]:
    return (Record(f"{name}[{number}]", values) for number, values in enumerate(rows))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
