"""Samples -> rows of one length, each token knowing which record it came from. Pure.

Nothing is lost on the way: what a row has no room for begins the next one; only the last row is padded.
Where packing is off, a sample has a row of its own and the tokens cut off are counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NO_RECORD = -1
"""Record of a padding position."""

Ints = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One tokenised record."""

    record: int
    """Number of the record in its file, from 0."""
    tokens: Ints
    """[n] token ids."""
    mask: Bytes
    """[n] 1 where the token carries loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One training row; all arrays are [max_length]."""

    tokens: Ints
    records: Ints
    """Record of each token, NO_RECORD where padded; a change of record is a border nothing attends across."""
    mask: Bytes


@dataclass(slots=True)
class Tally:
    """What became of every token."""

    samples: int = 0
    tokens: int = 0
    rows: int = 0
    padding_tokens: int = 0
    cut_tokens: int = 0
    loss_tokens: int = 0


def pack(samples: Iterable[Sample], *, length: int, join: bool, pad: int, tally: Tally) -> Iterator[Row]:
    """Rows of ``length`` tokens: samples joined end to end (``join``), or one sample a row."""
    pieces = _joined(samples, length, tally) if join else _single(samples, length, tally)
    for parts in pieces:
        row = _row(parts, length, pad)
        used = int((row.records != NO_RECORD).sum())
        tally.rows += 1
        tally.padding_tokens += length - used
        tally.loss_tokens += int(row.mask.sum())
        yield row


def _counted(sample: Sample, tally: Tally) -> Sample:
    tally.samples += 1
    tally.tokens += len(sample.tokens)
    return sample


def _joined(samples: Iterable[Sample], length: int, tally: Tally) -> Iterator[list[Sample]]:
    parts: list[Sample] = []
    room = length
    for sample in samples:
        rest = _counted(sample, tally)
        while len(rest.tokens) >= room:
            piece, rest = _cut(rest, room)
            yield [*parts, piece]
            parts, room = [], length
        if len(rest.tokens):
            parts.append(rest)
            room -= len(rest.tokens)
    if parts:
        yield parts


def _single(samples: Iterable[Sample], length: int, tally: Tally) -> Iterator[list[Sample]]:
    for sample in samples:
        piece, rest = _cut(_counted(sample, tally), length)
        tally.cut_tokens += len(rest.tokens)
        yield [piece]


def _cut(sample: Sample, at: int) -> tuple[Sample, Sample]:
    head = Sample(record=sample.record, tokens=sample.tokens[:at], mask=sample.mask[:at])
    tail = Sample(record=sample.record, tokens=sample.tokens[at:], mask=sample.mask[at:])
    return head, tail


def _row(parts: list[Sample], length: int, pad: int) -> Row:
    tokens = np.full(length, pad, np.int32)
    records = np.full(length, NO_RECORD, np.int32)
    mask = np.zeros(length, np.uint8)
    at = 0
    for part in parts:
        here = slice(at, at + len(part.tokens))
        tokens[here], records[here], mask[here] = part.tokens, part.record, part.mask
        at = here.stop
    return Row(tokens=tokens, records=records, mask=mask)


def held_out(key: str, share: float) -> bool:
    """Whether records of this key are kept for evaluation: a hash decides, so that no list must be kept."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64 < share
