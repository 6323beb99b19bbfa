"""The fault table: what a row is, what came of it, and how it is judged and written down. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from chaos.bed import Bed

Mode = Literal["local", "hosts"]
MODES: tuple[Mode, ...] = ("local", "hosts")
FAULTS = 33
HEAD = (
    *("number", "fault", "mode", "detected after", "cause named", "training again after"),
    *("steps lost", "orphans", "exit code", "result"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a fault led to."""

    detected_s: float | None = None
    """From the injection, or the start of what finds it there, to the launcher's first word of it; None: it was to go
    unnoticed, or nothing was said.
    """
    cause: str = ""
    """The line that names it."""
    again_s: float | None = None
    """From the injection to the next attempt's first step; None: the run was to end, or was not held up."""
    steps_lost: int | None = None
    """Finished steps that were done again; None: there were no steps."""
    orphans: int = 0
    """Processes and listening sockets left when the launcher had ended and 15 s had passed."""
    exit_code: int | None = None
    wrong: tuple[str, ...] = ()
    """What was not as it has to be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One row of the catalogue, in both modes."""

    number: int
    name: str
    local: Callable[[Bed], Found]
    hosts: Callable[[Bed], Found]
    quick: bool = False
    """It belongs to the slice that CI runs."""

    def inject(self, bed: Bed) -> Found:
        """Brings it about in the bed's mode."""
        return self.local(bed) if bed.mode == "local" else self.hosts(bed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of docs/faults.md."""

    number: int
    fault: str
    mode: Mode
    found: Found

    @property
    def passed(self) -> bool:
        """Everything was as it has to be, and nothing was left."""
        return not self.why

    @property
    def why(self) -> str:
        """What was wrong; empty: nothing."""
        left = [f"{self.found.orphans} processes or sockets left"] if self.found.orphans else []
        return "; ".join([*self.found.wrong, *left])

    def cells(self) -> tuple[str, ...]:
        """In the order of HEAD."""
        found = self.found
        return (
            *(str(self.number), self.fault, self.mode, _seconds(found.detected_s), _cell(found.cause) or "-"),
            *(_seconds(found.again_s), "-" if found.steps_lost is None else str(found.steps_lost)),
            *(str(found.orphans), "-" if found.exit_code is None else str(found.exit_code)),
            "passed" if self.passed else "failed",
        )


def markdown(lines: Sequence[Line], facts: Mapping[str, str], intro: str) -> str:
    """The whole page: what it is, when and with what it was made, the table, and why rows failed."""
    rows = [HEAD, tuple("---" for _ in HEAD), *(line.cells() for line in lines)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    told = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    failed = [f"- {line.number} {line.mode}: {line.why}" for line in lines if not line.passed]
    why = "\n\nWhy rows failed:\n\n" + "\n".join(map(_cell, failed)) if failed else ""
    passed = f"- passed: {sum(line.passed for line in lines)} of {len(lines)} rows"
    there = {(line.number, line.mode) for line in lines}
    lacking = [f"{n} {mode}" for n in range(1, FAULTS + 1) for mode in MODES if (n, mode) not in there]
    not_run = f"\n- not run: {', '.join(lacking)}" if lacking else ""
    return f"{intro}\n\n{told}\n{passed}{not_run}\n\n{table}{why}\n"


def newest(kept: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Lines of several series of rows, the last of each row and mode, in order."""
    return sorted({(line.number, line.mode): line for line in _lines(kept)}.values(), key=_place)


def repeated(kept: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the page says of rows that were run more than once: of each but its last result nothing else is seen."""
    runs: dict[tuple[int, Mode], list[Line]] = {}
    for line in sorted(_lines(kept), key=_place):
        runs.setdefault((line.number, line.mode), []).append(line)
    told = [
        f"{number} {mode} {len(of_one)} times, {sum(not line.passed for line in of_one)} failed"
        for (number, mode), of_one in runs.items()
        if of_one[1:]
    ]
    return {"run more than once, the last result is shown": "; ".join(told)} if told else {}


def _lines(kept: Sequence[Mapping[str, Any]]) -> list[Line]:
    return [
        Line(**{**told, "found": Found(**{**told["found"], "wrong": tuple(told["found"]["wrong"])})}) for told in kept
    ]


def _place(line: Line) -> tuple[int, int]:
    return line.number, MODES.index(line.mode)


def check_complete(faults: Sequence[Fault]) -> None:
    """Every number once, none left out."""
    numbers = [fault.number for fault in faults]
    if sorted(numbers) != list(range(1, FAULTS + 1)):
        raise ValueError(f"the catalogue has the rows 1 to {FAULTS}, here are {sorted(numbers)}")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _cell(text: str, most: int = 160) -> str:
    flat = " ".join(text.replace("|", "/").split())
    return flat if len(flat) <= most else f"{flat[: most - 3]}..."
