"""``python -m chaos``: injects every fault of the catalogue and writes what came of it."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from cluster.hosts import Hosts

from chaos import disks, entering, hostile, links, ranks, saving
from chaos.bed import Bed, write_inputs
from chaos.job import leave
from chaos.table import MODES, Fault, Found, Line, Mode, check_complete, markdown, newest, repeated

FAMILIES = (ranks, links, saving, disks, entering, hostile)
ALL: tuple[Fault, ...] = tuple(sorted((f for family in FAMILIES for f in family.FAULTS), key=lambda f: f.number))
INTRO = """# Faults: what happens when ...

Written by `make chaos` (tests/chaos), which injects every fault into real runs: with two ranks on one host (`local`),
and with one rank on each of two hosts that are made of namespaces and reached over ssh (`hosts`). "Detected after" is
the time from the injection to the launcher's first word of it, "training again after" that to the next attempt's first
step; a start by itself takes the time given below. A fault that is there before the start is counted from the start:
of the run in rows 2, 9, 19, 21, 22, 24, 28, 33 and, on hosts, 14, 20, 27; of the resume in rows 13 and, local, 20, 27;
of the command in row 26, where the longest of all names is told. "Training again after" is counted from the start of
the resume where a run is resumed by hand: rows 13, 17, 18 and, local, 20, 27. Row 17 has no launcher to say a word: it
is the time until its last process is gone. Processes and sockets have 15 s to go before they count as orphans. A run
that ends with exit code 0 has the weights of an undisturbed run, byte by byte, unless the row says that hosts were
left out. The limit for a hang is set to a few seconds in these runs; the default is 60 s."""


def main() -> int:
    """Runs rows and prints them; exit code 1 where one failed."""
    args = _arguments()
    check_complete(ALL)
    signal.signal(signal.SIGTERM, leave)
    wanted = [f for f in ALL if (not args.rows or f.number in args.rows) and (f.quick or not args.quick)]
    lines: list[Line] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        with Hosts(3, Path(folder) / "c") as hosts:
            write_inputs(hosts.folder / "shared/inputs")
            beds = {mode: Bed(mode, hosts) for mode in args.modes}
            for bed in beds.values():
                with _shared(args.share):
                    bed.compute_reference()
            ready = time.monotonic()
            for fault, mode in ((fault, mode) for fault in wanted for mode in args.modes):
                if lines and time.monotonic() - ready > 60 * args.minutes:
                    print(f"not begun after {args.minutes:g} minutes: row {fault.number}, {mode}", flush=True)
                    continue
                with _shared(args.share):
                    lines.append(_try(fault, beds[mode]))
                _tell(lines[-1])
                _keep(lines[-1], args.results)
            facts = _facts(beds, time.monotonic() - began)
    if args.report:
        kept = [json.loads(text) for text in args.results.read_text().splitlines()] if args.results else []
        args.report.write_text(markdown(newest(kept) or lines, {**facts, **repeated(kept)}, INTRO))
    failed = [line for line in lines if not line.passed]
    print(f"{len(lines) - len(failed)} of {len(lines)} passed in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m chaos")
    parser.add_argument("--rows", type=lambda text: [int(word) for word in text.split(",")], default=[])
    parser.add_argument("--modes", type=lambda text: text.split(","), default=MODES)
    parser.add_argument("--quick", action="store_true", help="the slice for CI")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no row begins later than that")
    parser.add_argument("--report", type=Path, help="write the table here")
    parser.add_argument("--results", type=Path, help="add each row to this file, and report all rows that are in it")
    parser.add_argument("--share", type=Path, help="file whose lock is shared during each row, and free between them")
    return parser.parse_args()


@contextlib.contextmanager
def _shared(file: Path | None) -> Iterator[None]:
    """Lets timed work of others come between rows."""
    if file is None:
        yield
        return
    with file.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def _try(fault: Fault, bed: Bed) -> Line:
    """A row that breaks off has failed."""
    with bed.row(fault.number):
        try:
            found = fault.inject(bed)
        except Exception as broken:  # noqa: BLE001  # whatever it is, the next row is to run
            if not isinstance(broken, AssertionError):
                traceback.print_exc()
            found = Found(wrong=(f"{type(broken).__name__}: {broken}",), orphans=len(bed.left()))
    return Line(number=fault.number, fault=fault.name, mode=bed.mode, found=found)


def _tell(line: Line) -> None:
    print(" | ".join(line.cells()), flush=True)
    if not line.passed:
        print(f"    {line.why}", flush=True)


def _keep(line: Line, file: Path | None) -> None:
    if file is not None:
        with file.open("a") as kept:
            kept.write(json.dumps(asdict(line)) + "\n")


def _facts(beds: dict[Mode, Bed], seconds: float) -> dict[str, str]:
    names = ("torch", "transformers", "trl", "accelerate", "safetensors")
    starts = ", ".join(f"{mode} {bed.start_s:.1f} s" for mode, bed in beds.items())
    return {
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        "machine": f"{len(os.sched_getaffinity(0))} cpus, {platform.machine()}, Linux {platform.release()}",
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{n} {metadata.version(n)}" for n in names)]),
        "start to first step, undisturbed": starts,
        "rows of the last start took": f"{seconds / 60:.0f} min",
    }


if __name__ == "__main__":
    sys.exit(main())
