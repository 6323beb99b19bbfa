"""falcon: the verbs beside launching. Those that need torch are handed to ``python -m falcon_dist``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from falcon_dist.contract import EXIT_FAILED, EXIT_USER_ERROR
from launcher import folder, render, sysfs
from launcher.errors import UserError

OWN: Final = {
    "topology": "print what this machine is made of, as JSON",
    "report": "print how a run ended",
}
HANDED_ON: Final = {
    "chat": "talk to a model or a checkpoint",
    "compare": "two models on the same held-out rows and prompts",
    "preview": "show what a model would be trained on, row by row",
    "prepare": "build a recipe's packed data on this machine",
    "train": "run one rank; falcon-launch does this for you",
}


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    try:
        return run(sys.argv[1:])
    except UserError as fault:
        sys.stderr.write(f"falcon: {fault}\n")
        return EXIT_USER_ERROR
    except BrokenPipeError:
        return EXIT_FAILED


def run(argv: Sequence[str]) -> int:
    """Runs one verb; does not return for a verb that is handed on.

    Raises:
        UserError: there is no such verb, or it refuses its arguments.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(help_text())
        return 0
    verb, *rest = argv
    if verb in HANDED_ON:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-P", "-m", "falcon_dist", verb, *rest])  # noqa: S606  # in place of this process
    if verb not in OWN:
        raise UserError(f'no such verb: "{verb}"; verbs: {", ".join([*OWN, *HANDED_ON])}')
    return _topology(rest) if verb == "topology" else _report(rest)


def help_text() -> str:
    """All verbs, one a line."""
    verbs = {**OWN, **HANDED_ON}
    rows = "\n".join(f"  {verb:10} {what}" for verb, what in verbs.items())
    return f"usage: falcon VERB [arguments]\n\n{rows}\n\nfalcon-launch starts training; see falcon-launch --help\n"


def _topology(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="falcon topology", description=OWN["topology"])
    parser.add_argument("path", nargs="?", type=Path, help="a folder that holds sys/devices/system, or a saved JSON")
    given: Path | None = parser.parse_args(argv).path
    topology = sysfs.load(given) if given else sysfs.read()
    sys.stdout.write(json.dumps(topology.to_json(), indent=1) + "\n")
    return 0


def _report(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="falcon report", description=OWN["report"])
    parser.add_argument("run", help="run folder, or run id")
    parser.add_argument("--runs-dir", default="runs", help="where run folders are (default: runs)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    given = parser.parse_args(argv)
    report = folder.read_report(given.run, given.runs_dir)
    parts = [render.failure_text(report), render.closing_text(report)]
    text = json.dumps(report.to_json(), indent=1) if given.json else "\n".join(p for p in parts if p)
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
