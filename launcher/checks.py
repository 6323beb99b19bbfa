"""What must be the same, or be there, on all hosts before anything is started. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from launcher.cluster import HostFacts
from launcher.config import Program
from launcher.errors import HostError, LaunchError, UserError
from launcher.render import table

OURS: Final = ("falcon-dist", "torch", "transformers", "trl", "accelerate")
"""Distributions that must be the same where our own program runs."""
THEIRS: Final = ("falcon-dist", "torch")
LEAST_DISK_BYTES: Final = 1 << 30
CLOCK_S: Final = 1.0
Row = tuple[str, ...]


def judge(
    hosts: Sequence[str],
    facts: Sequence[HostFacts],
    surveys: Sequence[Mapping[str, Any]],
    cwd: str,
    program: Program | None,
) -> tuple[str, ...]:
    """Notes on what differs without harm.

    Raises:
        HostError: what is missing on a host, or a table of what differs between them.
        UserError: two of them are one machine.
    """
    missing = {host: _missing(host, told, cwd, program) for host, told in zip(hosts, surveys, strict=True)}
    if faults := [fault for found in missing.values() for fault in found]:
        raise HostError("\n".join(faults), tuple(host for host, found in missing.items() if found))
    _check_same_machine(hosts, facts)
    rows = _skew(facts, surveys, program)
    if rows:
        shown = table(("", *hosts), rows)
        names = ", ".join(row[0] for row in rows)
        raise HostError(f'hosts: not the same software: "{names}"; make them the same\n{shown}', _odd(hosts, rows))
    return _notes(hosts, surveys)


def clock_notes(hosts: Sequence[str], offsets_s: Sequence[float]) -> tuple[str, ...]:
    """Notes on clocks that are off: a run goes by monotonic time only, but its logs do not."""
    off = [(host, offset) for host, offset in zip(hosts, offsets_s, strict=True) if abs(offset) > CLOCK_S]
    return tuple(f"{host}: its clock is {offset:+.0f} s off, and so are times in its logs" for host, offset in off)


def _missing(host: str, told: Mapping[str, Any], cwd: str, program: Program | None) -> list[str]:
    faults = []
    if program is not None and not told["cwd"]:
        faults.append(f'{host}: no such folder: "{cwd}"; start from a folder that is on every host')
    elif program is not None and not program.module and told["script"] is None:
        where = "" if host == "localhost" else f"{host}: "
        faults.append(f'{where}no such script: "{program.argv[0]}"; give the path of a Python program')
    if not told["writable"]:
        faults.append(f'{host}: the run folder cannot be written: "{told["place"]}"; choose another with --runs-dir')
    return faults


def _check_same_machine(hosts: Sequence[str], facts: Sequence[HostFacts]) -> None:
    seen: dict[str, str] = {}
    for host, known in zip(hosts, facts, strict=True):
        other = seen.setdefault(known.machine or host, host)
        if other is not host:
            raise UserError(f'hosts: the same machine as {other}: "{host}"; name it once, with slots=N for N ranks')


def _skew(facts: Sequence[HostFacts], surveys: Sequence[Mapping[str, Any]], program: Program | None) -> list[Row]:
    rows = [("python", *(".".join(f.python_version.split(".")[:2]) for f in facts))]
    rows += [(name, *(f.versions.get(name, "-") for f in facts)) for name in (OURS if program is None else THEIRS)]
    rows.append(("falcon-dist code", *(s["code"] for s in surveys)))
    if program is not None:
        rows.append(("script", *(s["script"] or "-" for s in surveys)))
    return [row for row in rows if len(set(row[1:])) > 1]


def _odd(hosts: Sequence[str], rows: Sequence[Row]) -> tuple[str, ...]:
    """Hosts that differ from what more than half of them have; none where nothing is so common."""
    odd = set()
    for values in (row[1:] for row in rows):
        usual, count = Counter(values).most_common(1)[0]
        if 2 * count > len(hosts):
            odd |= {host for host, value in zip(hosts, values, strict=True) if value != usual}
    return tuple(host for host in hosts if host in odd)


def _notes(hosts: Sequence[str], surveys: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    notes = []
    kinds = {told["isa"] for told in surveys}
    if len(kinds) > 1:
        pairs = ", ".join(f"{host} {told['isa']}" for host, told in zip(hosts, surveys, strict=True))
        notes.append(f"hosts differ in their widest instruction set; the slowest sets the pace: {pairs}")
    for host, told in zip(hosts, surveys, strict=True):
        if told["disk_bytes"] < LEAST_DISK_BYTES:
            notes.append(f"{host} has {told['disk_bytes'] / 1e9:.1f} GB left where the run folder is: {told['place']}")
    return tuple(notes)


def older_checkpoints(host: str, there: int, known: int, made: int, run_dir: str) -> tuple[str, ...]:
    """What to say where node 0 has older checkpoints of a run than there have been. Pure.

    Args:
        host: node 0.
        there: step of the newest one that it has; 0: none.
        known: step of the newest one that the run's reports tell of.
        made: of the newest one that the attempts before this one have made.
        run_dir: where it looked.

    Raises:
        LaunchError: it has none, or lacks what was made just now: it is on another host's disk.
    """
    if there >= known:
        return ()
    has = f"has this run's checkpoints up to step {there} only" if there else "has no checkpoint of this run"
    text = f'{host}: {has}, the newest known is of step {known}: "{run_dir}/checkpoints"'
    if not there or there < made:
        raise LaunchError(f"{text}; put --runs-dir where all hosts see it")
    return (text,)
