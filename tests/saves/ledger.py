"""What was done to how many saves, and in which phase it met them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class Ledger:
    """Counts of what happened, as (what was done, where it met the run)."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._counts: Counter[tuple[str, str]] = Counter()
        self._facts: dict[str, object] = {}
        self._lives: list[str] = []

    def count(self, what: str, where: str) -> None:
        self._counts[what, where] += 1

    def fact(self, name: str, value: object) -> None:
        """A figure for the end."""
        self._facts[name] = value

    def life(self, line: str) -> None:
        """What one run went through."""
        self._lives.append(line)

    @property
    def total(self) -> int:
        return self._counts.total()

    def met(self, where: str) -> int:
        """How often it was there."""
        return sum(count for (_, place), count in self._counts.items() if place == where)

    def __str__(self) -> str:
        columns = sorted({what for what, _ in self._counts})
        rows = sorted({where for _, where in self._counts}, key=self.met, reverse=True)
        table = [["", *columns, "all"]]
        for row in rows:
            table.append([row, *(str(self._counts[what, row] or "") for what in columns), str(self.met(row))])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [f"{self.title}: {self.total}", *(_line(row, widths) for row in table)]
        return "\n".join([*self._lives, *lines, *(f"{name}: {value}" for name, value in self._facts.items())])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = zip(cells, widths, strict=True)
    return "  ".join(["", first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])
