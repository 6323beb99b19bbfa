"""A record, where it stands, and why it may be of no use. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Record:
    """One record and where it stands, for errors: ``talks.jsonl:7`` is a line, ``talks.parquet[6]`` the seventh row."""

    place: str
    values: Mapping[str, Any]


class BadRecord(Exception):  # noqa: N818  # what it is, not that it failed
    """A record that cannot be used; data.on_bad decides whether that ends the preparation."""

    def __init__(self, reason: str, detail: str = "", remedy: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        """The same words for every record of this fault, so that they can be counted."""
        self.detail = detail
        self.remedy = remedy


def check_text(text: str) -> None:
    """Raises BadRecord for half of a surrogate pair, which JSON can spell but no tokenizer or file can take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start].encode("unicode_escape").decode()
        raise BadRecord("half of a surrogate pair is no text", f'"{found}"', "write whole characters") from error


@dataclass(frozen=True, slots=True)
class Fault:
    """Why the record at this place cannot be used."""

    place: str
    reason: str
    detail: str = ""
    """What was found, quoted."""
    remedy: str = ""

    @classmethod
    def of(cls, place: str, bad: BadRecord) -> Fault:
        return cls(place, bad.reason, bad.detail, bad.remedy)

    def __str__(self) -> str:
        told = ": ".join(part for part in (self.place, self.reason, self.detail) if part)
        return f"{told}; {self.remedy}" if self.remedy else told


class Passage(NamedTuple):
    """A record as the model reads it."""

    text: str
    answers: tuple[tuple[int, int], ...] | None
    """Character ranges that carry loss; None: all of it does."""
