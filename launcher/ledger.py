"""The attempts of a run side by side: what each did, and where the time went. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from launcher.report import AttemptLine, RunReport

USEFUL: Final = "train"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One attempt as it was reported, and when."""

    report: RunReport
    cause: str
    """In one line; empty: it ended well."""
    began_s: float
    ended_s: float


def lines(entries: Sequence[Entry]) -> tuple[AttemptLine, ...]:
    """A line for each attempt, with the steps that the next one had to do again."""
    starts = [entry.report.first_step - 1 if entry.report.first_step else None for entry in entries]
    return tuple(_line(entry, after) for entry, after in zip(entries, [*starts[1:], None], strict=True))


def _line(entry: Entry, next_start: int | None) -> AttemptLine:
    report = entry.report
    kept = next_start if next_start is not None else max(report.checkpoint_step, (report.first_step or 1) - 1)
    return AttemptLine(
        attempt=report.attempt,
        outcome=report.outcome,
        exit_code=report.exit_code,
        cause=entry.cause,
        hosts=tuple(dict.fromkeys(rank.host for rank in report.ranks)),
        first_step=report.first_step,
        last_step=report.last_step,
        checkpoint_step=report.checkpoint_step,
        steps_lost=0 if report.outcome == "ok" else max(0, report.last_step - kept),
        seconds=round(entry.ended_s - entry.began_s, 1),
    )


def seconds(entries: Sequence[Entry]) -> dict[str, float]:
    """Where the time of the whole run went: each phase of all attempts, what lay between them, what was done twice."""
    spent: dict[str, float] = {}
    for entry in entries:
        for phase, duration in entry.report.timings_s.items():
            spent[phase] = spent.get(phase, 0.0) + duration
    elapsed = entries[-1].ended_s - entries[0].began_s
    spent["between attempts and hosts' answers"] = max(0.0, elapsed - sum(spent.values()))
    redone = sum(
        line.steps_lost * (entry.report.step_s or 0.0) for line, entry in zip(lines(entries), entries, strict=True)
    )
    if redone:
        spent["steps done again"] = redone
        spent[USEFUL] = max(0.0, spent.get(USEFUL, 0.0) - redone)
    return {phase: round(duration, 1) for phase, duration in spent.items()}


def goodput(entries: Sequence[Entry]) -> float | None:
    """Steps that were kept, times the usual seconds of one, over the time that passed; None: no step was done."""
    steps = [entry.report.step_s for entry in entries if entry.report.step_s]
    first, last = entries[0], entries[-1]
    elapsed = last.ended_s - first.began_s
    if not steps or elapsed <= 0:
        return None
    worked = [line for line in lines(entries) if line.first_step]
    if not worked:
        return None
    # An attempt that came to no step, as when its host was gone, took none away.
    kept = worked[-1].last_step - worked[-1].steps_lost - (worked[0].first_step or 1) + 1
    return round(max(0, kept) * sorted(steps)[len(steps) // 2] / elapsed, 4)
