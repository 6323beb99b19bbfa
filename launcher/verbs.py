"""falcon: the verbs beside launching. Those that need torch are handed to ``python -m falcon_dist``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from falcon_dist.contract import EXIT_FAILED
from launcher import command, folder, render, sysfs
from launcher.errors import UserError

OWN: Final = {
    "topology": "print what this machine is made of, as JSON",
    "report": "print how a run ended",
    "ps": "list runs in progress",
    "kill": "end a run, on all its hosts",
    "doctor": "look for what can go wrong, on all hosts of a hostfile",
}
HANDED_ON: Final = {
    "chat": "talk to a model or a checkpoint",
    "compare": "two models on the same held-out rows and prompts",
    "estimate": "memory that a run will need, by strategy, before anything is loaded",
    "merge": "write a model with the adapters of a LoRA run added to its weights",
    "quantize": "write a checkpoint with int8 or int4 weights",
    "push": "send a checkpoint to the Hugging Face hub, with a model card",
    "preview": "show what a model would be trained on, row by row",
    "prepare": "build a recipe's packed data on this machine",
    "train": "run one rank; falcon-launch does this for you",
}


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    return command.run("falcon", lambda: run(sys.argv[1:]))


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
    own = {"topology": _topology, "report": _report, "ps": _ps, "kill": _kill, "doctor": _doctor}
    return own[verb](rest)


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
    parser = _parser("report")
    parser.add_argument("run", help="run folder, or run id")
    parser.add_argument("--json", action="store_true", help="as JSON")
    given = parser.parse_args(argv)
    report = folder.read_report(given.run, given.runs_dir)
    parts = [_unfinished(given.run, given.runs_dir), render.failure_text(report), render.closing_text(report)]
    text = json.dumps(report.to_json(), indent=1) if given.json else "\n".join(p for p in parts if p)
    sys.stdout.write(text + "\n")
    return 0


def _unfinished(run: str, runs_dir: str) -> str:
    """What is to be known of a report that is not the last one; empty: nothing."""
    from launcher import running

    found = running.look(run, runs_dir)
    return f"this run has not ended ({found.state}); its newest attempt that has:" if found else ""


def _ps(argv: Sequence[str]) -> int:
    from launcher import running

    given = _parser("ps").parse_args(argv)
    rows = [run.row() for run in running.find_all(given.runs_dir)]
    text = render.table(("run", "since", "ranks", "hosts", "launcher", "state"), rows) if rows else "nothing runs"
    sys.stdout.write(f"{text}\n")
    return 0


def _kill(argv: Sequence[str]) -> int:
    from launcher import running

    parser = _parser("kill")
    parser.add_argument("run", help="run folder, or run id")
    given = parser.parse_args(argv)
    done = running.end(running.find(given.run, given.runs_dir))
    sys.stdout.write("".join(f"{host}: {text}\n" for host, text in done))
    return EXIT_FAILED if any("could not" in text for _, text in done) else 0


def _doctor(argv: Sequence[str]) -> int:
    from launcher import diagnosis, discover, doctor
    from launcher.launchsettings import LaunchSettings
    from launcher.reach import reach

    parser = _parser("doctor")
    for name in ("--hostfile", "--hosts", "--include", "--exclude"):
        parser.add_argument(name, help="as falcon-launch takes it")
    parser.add_argument("--quick", action="store_true", help="without what needs torch")
    given = vars(parser.parse_args(argv))
    run_dir, quick = str(Path(given.pop("runs_dir")).absolute() / "any"), given.pop("quick")
    way = reach(LaunchSettings(**given), os.environ)
    with discover.agents(way.hosts, way.transport) as agents:
        found = doctor.look(agents, way.hosts, run_dir, with_torch=not quick)
    sys.stdout.write(render.table(diagnosis.HEAD, diagnosis.overview(found)) + "\n\n")
    rows = diagnosis.problems(found)
    text = render.table(("host", "problem", "cure"), rows) if rows else "nothing wrong was found"
    sys.stdout.write(f"{text}\n")
    return EXIT_FAILED if rows else 0


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"falcon {verb}", description=OWN[verb])
    parser.add_argument("--runs-dir", default="runs", help="where run folders are (default: runs)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
