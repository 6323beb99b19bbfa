"""falcon-launch: flags -> configuration -> cluster -> placement -> plan -> run -> exit code. No logic of its own."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from falcon_dist.config import Value
from falcon_dist.contract import EXIT_FAILED, EXIT_USER_ERROR
from launcher import config, discover, environment, folder, hostfile, planner, render, sysfs, transport
from launcher.cluster import Cluster, HostFacts, join
from launcher.config import Flags, LaunchConfig, Program
from launcher.errors import LaunchError, UserError
from launcher.placement import place
from launcher.plan import LaunchPlan

USAGE: Final = """falcon-launch [flags]                                 train what a recipe says
       falcon-launch [flags] -- script.py [arguments]        run any torch.distributed program
       falcon-launch [flags] -m module [arguments]"""
LAUNCH_FLAGS: Final = {
    "nproc_per_node": "--nproc-per-node",
    "runs_dir": "--runs-dir",
    "run_id": "--run-id",
    "backend": "--backend",
}
SWITCHES: Final = ("--dry-run", "--json", "--quiet", "--version", "--help", "-h")
"""Own flags that take no value."""
MODULE_MARKS: Final = ("-m", "--module")
PROGRAM_MARKS: Final = ("--", *MODULE_MARKS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A command line, understood."""

    flags: Flags
    topologies: tuple[str, ...] = ()
    """PATH or HOST=PATH, in place of what the hosts say."""
    dry_run: bool = False
    as_json: bool = False
    quiet: bool = False


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    try:
        return launch(parse(sys.argv[1:]), os.environ)
    except UserError as fault:
        sys.stderr.write(f"falcon-launch: {fault}\n")
        return EXIT_USER_ERROR
    except LaunchError as fault:
        sys.stderr.write(f"falcon-launch: {fault}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130


def launch(order: Order, environ: Mapping[str, str]) -> int:
    """Plans, and unless told to stop there, runs.

    Raises:
        UserError: what was asked for cannot be.
        LaunchError: a host did not do its part.
    """
    settings = config.load(order.flags)
    hosts = hostfile.this_machine()
    saved = sysfs.load_for([entry.host for entry in hosts.entries], order.topologies)
    if order.dry_run and len(saved) == len(hosts.entries):
        facts = [HostFacts(topology=saved[e.host], python=sys.executable, versions={}) for e in hosts.entries]
        return _show_plan(order, settings, join(hosts, facts), environ)
    with discover.agents(hosts, transport.local) as agents:
        cluster = join(hosts, discover.ask(agents, saved))
        if order.dry_run:
            return _show_plan(order, settings, cluster, environ)
        return _run(order, settings, cluster, agents, environ)


def _plan(
    settings: LaunchConfig, cluster: Cluster, environ: Mapping[str, str], *, port: int | None, dry_run: bool
) -> LaunchPlan:
    placement = place(cluster, settings.launch.nproc_per_node)
    site = folder.site_of(settings, dry_run=dry_run)
    return planner.build(settings, cluster, placement, site, environ, port=port)


def _show_plan(order: Order, settings: LaunchConfig, cluster: Cluster, environ: Mapping[str, str]) -> int:
    planned = _plan(settings, cluster, environ, port=None, dry_run=True)
    if order.as_json:
        sys.stdout.write(json.dumps(render.plan_json(planned), indent=1) + "\n")
        return 0
    names = [item.partition("=")[0] for item in settings.launch.env]
    notes = _notes(settings, cluster, environ)
    sys.stdout.write("\n".join([render.plan_text(planned, names), *notes]) + "\n")
    return 0


def _run(
    order: Order,
    settings: LaunchConfig,
    cluster: Cluster,
    agents: discover.Agents,
    environ: Mapping[str, str],
) -> int:
    _plan(settings, cluster, environ, port=None, dry_run=True)  # a plan that cannot be is refused before any port
    # What only a real run needs is not loaded for --help and --dry-run.
    from launcher.console import Console
    from launcher.record import Record
    from launcher.run import Run

    _check_script(settings)
    port = discover.open_store(agents, cluster.nodes[0].addr)
    planned = _plan(settings, cluster, environ, port=port, dry_run=False)
    folder.create(settings, planned)
    console = Console(quiet=order.quiet or order.as_json)
    notes = _notes(settings, cluster, environ)
    for text in (f"run {planned.site.run_id}: {planned.site.run_dir}", *notes):
        console.say(text)
    report = Run(planned, agents, console, Record(planned, notes)).until_done()
    folder.keep_report(planned, report)
    if failure := render.failure_text(report):
        console.complain(failure)
    console.conclude(json.dumps(report.to_json()) if order.as_json else render.closing_text(report))
    return report.exit_code


def _check_script(settings: LaunchConfig) -> None:
    program = settings.program
    if program is not None and not program.module and not Path(program.argv[0]).exists():
        raise UserError(f'arguments: no such script: "{program.argv[0]}"; give the path of a Python program')


def _notes(settings: LaunchConfig, cluster: Cluster, environ: Mapping[str, str]) -> tuple[str, ...]:
    backend, why = planner.choose_backend(settings, cluster)
    chosen = (f"backend: {backend} ({why})",) if settings.program is None else ()
    withheld = environment.withheld(environ, settings.launch.env)
    kept_back = (f"not passed on to ranks: {', '.join(withheld)}; use --env NAME to pass one",) if withheld else ()
    return (*settings.notes, *chosen, *kept_back)


def parse(argv: Sequence[str]) -> Order:
    """The order a command line gives.

    Raises:
        UserError: a flag is not known or lacks its value.
    """
    own, program = _split(list(argv))
    parser = _parser()
    known, unknown = parser.parse_known_args(own)
    if unknown:
        raise UserError(_no_such_flag(unknown[0].partition("=")[0], parser))
    given = vars(known)
    return Order(
        flags=_flags(given, program),
        topologies=tuple(given["topology"]),
        dry_run=given["dry_run"],
        as_json=given["json"],
        quiet=given["quiet"],
    )


def _split(argv: list[str]) -> tuple[list[str], Program | None]:
    """Own flags, and the program after them, whose arguments are nobody else's business.

    A program begins after ``--`` or ``-m``, or at the first word that is no flag and no flag's value.
    """
    at = 0
    while at < len(argv) and argv[at].startswith("-") and argv[at] not in PROGRAM_MARKS:
        alone = "=" in argv[at] or argv[at].replace("_", "-") in SWITCHES
        at += 1 if alone or _is_last_word_of_resume(argv[at : at + 2]) else 2
    if at >= len(argv):
        return argv, None
    words = argv[at + 1 :] if argv[at] in PROGRAM_MARKS else argv[at:]
    if not words:
        raise UserError(f'arguments: nothing to run after "{argv[at]}"; see falcon-launch --help')
    return argv[:at], Program(module=argv[at] in MODULE_MARKS, argv=tuple(words))


def _is_last_word_of_resume(words: list[str]) -> bool:
    return words[0] == "--resume" and words[1:2] != [] and words[1].startswith("-")


def _flags(given: Mapping[str, Any], program: Program | None) -> Flags:
    values = {
        key: Value(given[key] if key == "run_id" else config.parse_value(given[key]), flag)
        for key, flag in LAUNCH_FLAGS.items()
        if given[key] is not None
    }
    return Flags(
        launch=values,
        sets=tuple(given["set"]),
        env=tuple(given["env"]),
        env_file=given["env_file"],
        recipe=given["recipe"],
        resume=given["resume"],
        program=program,
    )


class _Parser(argparse.ArgumentParser):
    names: tuple[str, ...] = ()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"arguments: {message}; see falcon-launch --help")

    def flag(self, name: str, *, also: tuple[str, ...] = (), **how: Any) -> None:
        """A flag in both spellings, of which the help shows one."""
        self.names += (name,)
        dest = name.strip("-").replace("-", "_")
        self.add_argument(name, dest=dest, **how)
        spellings = {name, *also, *(n[:2] + n[2:].replace("-", "_") for n in (name, *also))} - {name}
        if spellings:
            self.add_argument(*sorted(spellings), dest=dest, **how | {"help": argparse.SUPPRESS})


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib import metadata  # slow, and needed here only

        parser.exit(0, f"falcon-launch {metadata.version('falcon-dist')}\n")


def _no_such_flag(flag: str, parser: _Parser) -> str:
    near = difflib.get_close_matches(flag.replace("_", "-"), parser.names, 1)
    hint = f'did you mean "{near[0]}"?' if near else "see falcon-launch --help"
    return f'arguments: no such flag: "{flag}"; {hint}'


def _parser() -> _Parser:
    parser = _Parser(prog="falcon-launch", usage=USAGE, allow_abbrev=False, add_help=False)
    flag = parser.flag
    flag("--nproc-per-node", also=("--nprocs-per-node",), metavar="N", help='ranks; "auto": one per NUMA node')
    flag("--recipe", metavar="NAME|FILE", help="a complete configuration (default: demo)")
    flag("--set", metavar="KEY=VALUE", action="append", default=[], help="one setting, as --set optim.lr=2e-5")
    flag("--backend", metavar="NAME", help="collective backend: auto, gloo or ccl")
    flag("--env", metavar="NAME[=VALUE]", action="append", default=[], help="a variable for the ranks")
    flag("--env-file", metavar="FILE", help="NAME=VALUE lines for the ranks")
    flag("--resume", metavar="RUN", nargs="?", const="auto", help="go on with a run: its id, its folder, or auto")
    flag("--run-id", metavar="NAME", help="name of the run's folder (default: from the time)")
    flag("--runs-dir", metavar="DIR", help="where run folders are (default: runs)")
    flag(
        "--topology", metavar="[HOST=]PATH", action="append", default=[], help="a saved topology instead of the host's"
    )
    flag("--dry-run", action="store_true", help="print the plan and stop")
    flag("--json", action="store_true", help="the plan or the report as JSON")
    flag("--quiet", action="store_true", help="failures and the closing report only")
    flag("--version", action=_Version, nargs=0, help="print the version")
    parser.add_argument("-h", "--help", action="help", help="print this")
    return parser


if __name__ == "__main__":
    sys.exit(main())
