"""Files -> records, one reader for each format; none holds more than a piece of its file."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

from falcon_dist.config import TextBy
from falcon_dist.contract import UserError
from falcon_dist.records import Fault, Record

Item = Record | Fault
_LONGEST_FIELD: Final = 1 << 27
"""Characters of one CSV field; the csv module's own limit of 131,072 is less than a long talk."""


def kind_of(path: Path) -> str:
    """The format that a name tells: talks.jsonl.gz -> ".jsonl"."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def read_file(path: Path, text_by: TextBy) -> Iterator[Item]:
    """Every record of a file in order, with a Fault in the place of what is none.

    Raises:
        UserError: the format is not known, or the file as a whole is not of its format.
    """
    if kind_of(path) not in READERS:
        raise UserError(f"{path}: no format that can be read; known: {', '.join(READERS)}, each also as .gz")
    try:
        yield from READERS[kind_of(path)](path, text_by)
    except UnicodeDecodeError as error:
        raise UserError(
            f'{path}: not UTF-8 text: byte {error.start} of a piece is "{error.object[error.start]:#x}"'
        ) from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from error


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        yield from enumerate(text, start=1)


def _read_jsonl(path: Path, _: TextBy) -> Iterator[Item]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_object(f"{path}:{number}", line)


def _json_object(place: str, line: bytes) -> Item:
    try:
        values = json.loads(line)
    except (ValueError, UnicodeDecodeError):
        values = None
    if isinstance(values, dict):
        return Record(place, values)
    shown = line[:40].decode("utf-8", "replace").strip()
    return Fault(place, "not a JSON object", f'"{shown}"', "write one object a line")


def _read_json(path: Path, _: TextBy) -> Iterator[Item]:
    import ijson

    number = -1
    with _open(path) as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        try:
            for number, values in enumerate(_items_of_the_list(path, ijson.basic_parse(file, use_float=True))):
                place = f"{path}[{number}]"
                yield Record(place, values) if isinstance(values, dict) else _no_object(place, values)
        except ijson.JSONError as error:
            fault = f"{path}[{number + 1}]: not JSON: {_first_line(error.args[0])}"
            raise UserError(f"{fault}; for one object a line name it .jsonl") from error


def _items_of_the_list(path: Path, events: Iterator[tuple[str, Any]]) -> Iterator[Any]:
    """Items of the list that the file is, or of the one list in an object such as {"data": [...]}, as they come.

    Args:
        path: for the error.
        events: ijson's (event, value) pairs.
    """
    import ijson

    item, depth, lists, floor = ijson.ObjectBuilder(), 0, 0, None  # floor: how deep the list's items are
    for event, value in events:
        opens, closes = event.startswith("start_"), event.startswith("end_")
        depth -= closes
        if floor is not None and depth >= floor:
            item.event(event, value)
            if depth == floor and not opens:
                yield item.value
                item = ijson.ObjectBuilder()
        elif floor is not None:
            floor = None
        elif event == "start_array" and depth <= 1:
            lists, floor = lists + 1, depth + 1
            if lists > 1:
                break
        depth += opens
    if lists != 1:
        raise UserError(f"{path}: a .json file must hold one list of objects; for one object a line name it .jsonl")


def _first_line(told: str | bytes) -> str:
    """Of ijson's errors, which are text or bytes and draw a picture below."""
    text = told.decode("utf-8", "replace") if isinstance(told, bytes) else told
    return text.splitlines()[0].rstrip(".")


def _no_object(place: str, values: Any) -> Fault:
    return Fault(place, "not a JSON object", f'"{json.dumps(values)[:40]}"', "write a list of objects")


def _read_csv(path: Path, _: TextBy) -> Iterator[Item]:
    csv.field_size_limit(_LONGEST_FIELD)
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)
        before = 1
        while True:
            try:
                values = next(rows, None)
            except csv.Error as error:
                yield Fault(f"{path}:{before + 1}", "not a CSV row", str(error))
                before = rows.reader.line_num
                continue
            if values is None:
                return
            yield _csv_row(f"{path}:{before + 1}", values)
            before = rows.line_num


def _csv_row(place: str, values: Mapping[str | None, Any]) -> Item:
    if None in values:
        return Fault(place, "row has more fields than the header", f'"{values[None][0]}"', "quote fields with commas")
    if None in values.values():
        return Fault(place, "row has fewer fields than the header")
    return Record(place, {str(k): v for k, v in values.items()})


def _read_text(path: Path, text_by: TextBy) -> Iterator[Item]:
    if text_by == "document":
        yield Record(f"{path}:1", {"text": "".join(line for _, line in _lines(path)).strip()})
        return
    if text_by == "line":
        yield from (Record(f"{path}:{n}", {"text": line.strip()}) for n, line in _lines(path) if line.strip())
        return
    for filled, group in itertools.groupby(_lines(path), key=lambda numbered: bool(numbered[1].strip())):
        if filled:
            lines = list(group)
            yield Record(f"{path}:{lines[0][0]}", {"text": "".join(line for _, line in lines).strip()})


def _read_parquet(path: Path, _: TextBy) -> Iterator[Item]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with _open(path) as raw, parquet.ParquetFile(raw if path.suffix == ".gz" else path) as file:
            batches = file.iter_batches(batch_size=512)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from (Record(f"{path}[{number}]", row) for number, row in enumerate(rows))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file: {next(iter(str(error).splitlines()), '')}") from error


READERS: Final[Mapping[str, Callable[[Path, TextBy], Iterator[Item]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}
