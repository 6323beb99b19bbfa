"""CpuSet: a set of cpu (or NUMA node) numbers that parses and prints "0-3,8".

>>> str(CpuSet.parse("3,0-1,8") & CpuSet.parse("0-3"))
'0-1,3'
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

MAX_CPU: Final = 65535
"""Highest number accepted: eight times the most cpus a Linux kernel can be built for."""


@dataclass(frozen=True, slots=True)
class CpuSet:
    """An immutable set of numbers in the kernel's list format; str() and parse() are inverses."""

    ids: frozenset[int] = frozenset()

    @classmethod
    def of(cls, ids: Iterable[int]) -> CpuSet:
        """The set of these numbers."""
        return cls(frozenset(ids))

    @classmethod
    def parse(cls, text: str) -> CpuSet:
        """The set written as "0-3,8"; blank text is the empty set.

        Raises:
            ValueError: the text is no such list; the message holds the faulty part.
        """
        parts = text.strip().split(",") if text.strip() else []
        return cls(frozenset(i for part in parts for i in _range_of(part)))

    def __str__(self) -> str:
        return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in self._runs())

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, cpu: object) -> bool:
        return cpu in self.ids

    def __and__(self, other: CpuSet) -> CpuSet:
        return CpuSet(self.ids & other.ids)

    def __or__(self, other: CpuSet) -> CpuSet:
        return CpuSet(self.ids | other.ids)

    def __sub__(self, other: CpuSet) -> CpuSet:
        return CpuSet(self.ids - other.ids)

    def _runs(self) -> list[tuple[int, int]]:
        runs: list[tuple[int, int]] = []
        for cpu in self:
            if runs and runs[-1][1] == cpu - 1:
                runs[-1] = (runs[-1][0], cpu)
            else:
                runs.append((cpu, cpu))
        return runs


def union(sets: Iterable[CpuSet]) -> CpuSet:
    """All numbers that are in any of the sets."""
    return CpuSet(frozenset().union(*(s.ids for s in sets)))


def _range_of(part: str) -> range:
    first, dash, last = part.strip().partition("-")
    numbers = (first, last) if dash else (first, first)
    if not all(n.isascii() and n.isdigit() and int(n) <= MAX_CPU for n in numbers):
        raise ValueError(f'not a list of cpus like 0-3,8: "{part}"')
    if int(numbers[0]) > int(numbers[1]):
        raise ValueError(f'a range that runs backwards: "{part}"')
    return range(int(numbers[0]), int(numbers[1]) + 1)
