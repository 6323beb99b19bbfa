"""Samples -> rows of one length, each token knowing which record it came from. Pure.

wrapped: nothing is lost, what a row has no room for begins the next one. best-fit and off keep a sample in
one row; what is longer than a row is cut off and counted.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from falcon_dist.config import Packing

NO_RECORD: Final = -1
"""Record of a padding position."""
WINDOW_TOKENS: Final = 1 << 22
"""Best-fit looks at samples of this many tokens together: bounds memory, costs next to no room."""

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
    """Tokens for which there was no room."""
    loss_tokens: int = 0
    """Tokens that are learned: those that begin a record's run in a row are not, whatever they carry."""
    silent_rows: int = 0
    """Rows in which no token carries loss."""


class Packer:
    """Samples in, rows of ``length`` tokens out as they fill up, every token counted."""

    def __init__(self, kind: Packing, *, length: int, pad: int) -> None:
        self.tally = Tally()
        self._length = length
        self._pad = pad
        ways: dict[Packing, type[_Wrapped | _BestFit | _Single]]
        ways = {"wrapped": _Wrapped, "best-fit": _BestFit, "off": _Single}
        self._layout = ways[kind](length)

    def add(self, sample: Sample) -> Iterator[Row]:
        """The rows that are full with this sample; must be walked through."""
        self.tally.samples += 1
        self.tally.tokens += len(sample.tokens)
        yield from self._rows(self._layout.add(sample))

    def finish(self) -> Iterator[Row]:
        """The rows of what is left, padded."""
        yield from self._rows(self._layout.finish())
        laid = self.tally.rows * self._length - self.tally.padding_tokens
        self.tally.cut_tokens = self.tally.tokens - laid

    def _rows(self, rows: Iterator[list[Sample]]) -> Iterator[Row]:
        for parts in rows:
            row = _row(parts, self._length, self._pad)
            self.tally.rows += 1
            self.tally.padding_tokens += self._length - sum(len(part.tokens) for part in parts)
            learned = int(learned_of(row.records, row.mask).sum())
            self.tally.loss_tokens += learned
            self.tally.silent_rows += not learned
            yield row


class _Wrapped:
    """Samples joined end to end and cut into rows; only the last row is padded."""

    def __init__(self, length: int) -> None:
        self._length = self._room = length
        self._parts: list[Sample] = []

    def add(self, sample: Sample) -> Iterator[list[Sample]]:
        rest = sample
        while len(rest.tokens) >= self._room:
            piece, rest = _cut(rest, self._room)
            yield [*self._parts, piece]
            self._parts, self._room = [], self._length
        if len(rest.tokens):
            self._parts.append(rest)
            self._room -= len(rest.tokens)

    def finish(self) -> Iterator[list[Sample]]:
        if self._parts:
            yield self._parts


class _Single:
    """One sample a row; what is longer than a row is cut off."""

    def __init__(self, length: int) -> None:
        self._length = length

    def add(self, sample: Sample) -> Iterator[list[Sample]]:
        yield [_cut(sample, self._length)[0]]

    def finish(self) -> Iterator[list[Sample]]:
        return iter(())


class _BestFit:
    """Whole samples, as many as a row holds; only what is longer than a row is cut off."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._waiting: list[Sample] = []
        self._tokens = 0

    def add(self, sample: Sample) -> Iterator[list[Sample]]:
        piece = _cut(sample, self._length)[0]
        self._waiting.append(piece)
        self._tokens += len(piece.tokens)
        if self._tokens >= WINDOW_TOKENS:
            yield from self.finish()

    def finish(self) -> Iterator[list[Sample]]:
        waiting, self._waiting, self._tokens = self._waiting, [], 0
        for bin_ in best_fit([len(sample.tokens) for sample in waiting], self._length):
            yield [waiting[i] for i in bin_]


def best_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Numbers of the samples in each row, by best-fit decreasing (Johnson, "Fast algorithms for bin packing", 1974).

    Args:
        lengths: tokens of each sample, from 1 to ``length``.
        length: tokens that a row holds.
    """
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, sorted
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(rooms, lengths[number])
        if at == len(rooms):
            bins.append([number])
            _offer(by_room, rooms, length - lengths[number], len(bins) - 1)
            continue
        room = rooms[at]
        chosen = by_room[room].pop()
        if not by_room[room]:
            del by_room[room], rooms[at]
        bins[chosen].append(number)
        _offer(by_room, rooms, room - lengths[number], chosen)
    return bins


def _offer(by_room: dict[int, list[int]], rooms: list[int], room: int, chosen: int) -> None:
    if room == 0:
        return
    if room not in by_room:
        by_room[room] = []
        bisect.insort(rooms, room)
    by_room[room].append(chosen)


class Forecast:
    """What each way of packing would make of the same samples, from their lengths alone."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._samples = self._tokens = self._broken = self._cut = 0
        self._window: list[int] = []
        self._window_tokens = self._best_rows = 0

    def add(self, tokens: int) -> None:
        """Counts a sample of so many tokens."""
        fits = min(tokens, self._length)
        # A sample is broken where a row ends inside it.
        self._broken += self._tokens // self._length != (self._tokens + tokens - 1) // self._length
        self._samples += 1
        self._tokens += tokens
        self._cut += tokens - fits
        self._window.append(fits)
        self._window_tokens += fits
        if self._window_tokens >= WINDOW_TOKENS:
            self._close()

    def _close(self) -> None:
        self._best_rows += len(best_fit(self._window, self._length))
        self._window, self._window_tokens = [], 0

    def result(self) -> dict[str, dict[str, int]]:
        """{way: rows, padding, tokens cut off, samples broken over rows}."""
        self._close()
        whole = -(-self._tokens // self._length)
        rows = {"wrapped": whole, "best-fit": self._best_rows, "off": self._samples}
        return {
            way: {
                "rows": count,
                "cut": 0 if way == "wrapped" else self._cut,
                "padding": count * self._length - self._tokens + (0 if way == "wrapped" else self._cut),
                "broken": self._broken if way == "wrapped" else 0,
            }
            for way, count in rows.items()
        }


def _cut(sample: Sample, at: int) -> tuple[Sample, Sample]:
    head = Sample(record=sample.record, tokens=sample.tokens[:at], mask=sample.mask[:at])
    tail = Sample(record=sample.record, tokens=sample.tokens[at:], mask=sample.mask[at:])
    return head, tail


def learned_of(records: npt.NDArray[Any], mask: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """[..., T] of whose record and with what loss -> which tokens are learned: those with loss after one of the same
    record, for nothing before a border may predict what comes after it.
    """
    learned = mask.astype(bool)
    learned[..., 1:] &= records[..., 1:] == records[..., :-1]
    learned[..., 0] = False
    return learned


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
