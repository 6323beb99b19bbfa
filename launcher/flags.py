"""The command line of falcon-launch: words -> Order. Every flag in both spellings, ``-`` and ``_``."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

from falcon_dist.config import Value, parse_value
from falcon_dist.old_names import translate
from launcher.config import Flags, Program
from launcher.errors import UserError

USAGE: Final = """falcon-launch [flags]                                 train what a recipe says
       falcon-launch [flags] -- script.py [arguments]        run any torch.distributed program
       falcon-launch [flags] -m module [arguments]"""
TEXT_FLAGS: Final = (
    "run_id",
    "runs_dir",
    "hostfile",
    "hosts",
    "include",
    "exclude",
    "sockets",
    "numa_nodes",
    "cores_list",
)
"""Settings that are text even where they look like a number."""
NUMBER_FLAGS: Final = (
    *("max_restarts", "min_nodes"),
    "nproc_per_node",
    "nnodes",
    "ncores_per_rank",
    "ccl_worker_count",
    "backend",
    "memory_allocator",
)
TRAIN_FLAGS: Final[Mapping[str, str]] = {"engine.kind": "engine", "report.profile": "profile"}
"""Settings of our own program that have flags of their own."""
SLURM_TEXTS: Final = ("partition", "time", "account", "qos")
"""Settings of a job that are text; with ``cpus_per_task`` and ``sbatch`` all that --slurm alone has use for."""
NOT_IN_JOBS: Final = (
    *("--slurm", "--dry-run", "--json", "--sbatch", "--cpus-per-task"),
    *(f"--{name}" for name in SLURM_TEXTS),
)
"""Flags that a job script has as options of its own, or no use for."""
SWITCHES: Final = (
    "--slurm",
    *("--dry-run", "--json", "--quiet", "--use-logical-cores", "--report-bindings", "--explain"),
    *("--version", "--help", "-h"),
)
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
    report_bindings: bool = False
    explain: bool = False
    slurm: bool = False
    """To be run as a Slurm job, which is submitted from here."""
    job_words: tuple[str, ...] = ()
    """The flags of this command line that a job script repeats."""
    program_words: tuple[str, ...] = ()
    """What follows the flags: a program and its arguments, with what marks its beginning."""


def parse(argv: Sequence[str]) -> Order:
    """The order a command line gives.

    Raises:
        UserError: a flag is not known or lacks its value.
    """
    today, notes = translate(argv, SWITCHES)
    own, program = _split(today)
    parser = _parser()
    known, unknown = parser.parse_known_args(own)
    if unknown:
        raise UserError(_no_such_flag(unknown[0].partition("=")[0], parser))
    given = vars(known)
    return Order(
        flags=replace(_flags(given, program), notes=notes),
        topologies=tuple(given["topology"]),
        dry_run=given["dry_run"],
        as_json=given["json"],
        quiet=given["quiet"],
        report_bindings=given["report_bindings"],
        explain=given["explain"],
        slurm=given["slurm"],
        job_words=tuple(_job_words(own)),
        program_words=tuple(today[len(own) :]),
    )


def _job_words(own: Sequence[str]) -> Iterator[str]:
    """Own flags without those that a job script says in its own way."""
    skip = False
    for word in own:
        name = word.partition("=")[0].replace("_", "-")
        if skip:
            skip = False
        elif name in NOT_IN_JOBS:
            skip = name not in SWITCHES and "=" not in word
        else:
            yield word


def _slurm_settings(given: Mapping[str, Any]) -> dict[str, Value]:
    texts = {key: Value(given[key], f"--{key}") for key in SLURM_TEXTS if given[key] is not None}
    cpus = given["cpus_per_task"]
    numbers = {} if cpus is None else {"cpus_per_task": Value(parse_value(cpus), "--cpus-per-task")}
    options = {"options": Value(given["sbatch"], "--sbatch")} if given["sbatch"] else {}
    found = texts | numbers | options
    if found and not given["slurm"]:
        first = next(iter(found.values()))
        raise UserError(f'{first.source}: is for the job that --slurm submits: "{first.value}"; add --slurm')
    return found


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
    return Flags(
        as_job=given["slurm"],
        launch=_settings(given),
        slurm=_slurm_settings(given),
        train=_train_settings(given),
        sets=tuple(given["set"]),
        env=tuple(given["env"]),
        env_file=given["env_file"],
        recipe=given["recipe"],
        resume=given["resume"],
        program=program,
    )


def _train_settings(given: Mapping[str, Any]) -> dict[str, Value]:
    there = {key: name for key, name in TRAIN_FLAGS.items() if given[name] is not None}
    return {key: Value(parse_value(given[name]), f"--{name}") for key, name in there.items()}


def _settings(given: Mapping[str, Any]) -> dict[str, Value]:
    """Keys of LaunchSettings that were given, each with its flag."""
    texts = {key: given[key] for key in TEXT_FLAGS if given[key] is not None}
    others = {key: parse_value(given[key]) for key in NUMBER_FLAGS if given[key] is not None}
    switched = {"use_logical_cores": True} if given["use_logical_cores"] else {}
    return {key: Value(value, f"--{key.replace('_', '-')}") for key, value in (texts | others | switched).items()}


class _Parser(argparse.ArgumentParser):
    names: tuple[str, ...] = ()

    def error(self, message: str) -> NoReturn:
        raise UserError(f"arguments: {message}; see falcon-launch --help")

    def flag(self, name: str, *, also: tuple[str, ...] = (), **how: Any) -> None:
        """A flag in both spellings, of which the help shows one."""
        self.names += (name,)
        dest = name.strip("-").replace("-", "_")
        self.add_argument(name, dest=dest, **how)
        spellings = {*also, *(n[:2] + n[2:].replace("-", "_") for n in (name, *also))} - {name}
        if spellings:
            self.add_argument(*sorted(spellings), dest=dest, **how | {"help": argparse.SUPPRESS})


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib import metadata  # slow, and needed here only

        print("falcon-launch", metadata.version("falcon-dist"))
        parser.exit()


def _no_such_flag(flag: str, parser: _Parser) -> str:
    near = difflib.get_close_matches(flag.replace("_", "-"), parser.names, 1)
    hint = f'did you mean "{near[0]}"?' if near else "see falcon-launch --help"
    return f'arguments: no such flag: "{flag}"; {hint}'


def _parser() -> _Parser:
    parser = _Parser(prog="falcon-launch", usage=USAGE, allow_abbrev=False, add_help=False)
    for add in (_host_flags, _core_flags, _run_flags, _slurm_flags):
        add(parser)
    parser.flag("--version", action=_Version, nargs=0, help="print the version")
    parser.add_argument("-h", "--help", action="help", help="print this")
    return parser


def _host_flags(parser: _Parser) -> None:
    flag = parser.flag
    flag("--hostfile", also=("-H", "-f"), metavar="FILE", help="hosts of the run, one a line (docs/launching.md)")
    flag("--hosts", also=("-host",), metavar="A,B", help='the same as a list: "a,b:2,node[1-3]"')
    flag("--include", also=("-i",), metavar="A@B:0,1", help="these hosts (or slots of them) only")
    flag("--exclude", also=("-e",), metavar="A@B:0,1", help="all hosts but these")
    flag("--nnodes", also=("--num-nodes",), metavar="N|MIN:MAX", help="the first N hosts (default: all)")
    flag("--min-nodes", metavar="N", help="go on with as few as N hosts when others fail (default: all)")


def _core_flags(parser: _Parser) -> None:
    flag = parser.flag
    flag(
        "--nproc-per-node",
        also=("--nprocs-per-node", "-ppn"),
        metavar="N",
        help='ranks on each host; "auto": its slots, or one per NUMA node; "numa", "socket": one for each',
    )
    flag("--sockets", metavar="LIST", help='use these sockets only, as "0"')
    flag("--numa-nodes", also=("--nodes-list",), metavar="LIST", help='use these NUMA nodes only, as "0-1"')
    flag("--cores-list", also=("--core-list",), metavar="LIST", help='use these cpus only, as "0-27"')
    flag("--ncores-per-rank", also=("--ncores-per-instance",), metavar="N", help="compute cores of each rank")
    flag("--use-logical-cores", action="store_true", help="all threads of each core, not one")
    flag("--ccl-worker-count", metavar="N", help="cores of each rank kept free for oneCCL's workers")
    flag("--memory-allocator", metavar="NAME", help="default, tcmalloc or jemalloc")
    flag("--report-bindings", action="store_true", help="print every rank's cores at the start")
    flag("--explain", action="store_true", help="print why cpus are not used")


def _run_flags(parser: _Parser) -> None:
    flag = parser.flag
    default = "demo, unless --set names model or data"
    flag("--recipe", metavar="NAME|FILE", help=f"a complete configuration (default: {default})")
    flag("--set", metavar="KEY=VALUE", action="append", default=[], help="one setting, as --set optim.lr=2e-5")
    flag("--engine", choices=("native", "ipex"), help="native (default) or ipex (docs/ipex.md)")
    flag("--profile", metavar="N", help="a torch trace of N steps, in rank 0's folder")
    flag("--backend", metavar="NAME", help="collectives of our own program: auto, gloo, ccl, ccl-intel")
    flag("--env", metavar="NAME[=VALUE]", action="append", default=[], help="a variable for the ranks")
    flag("--env-file", metavar="FILE", help="NAME=VALUE lines for the ranks")
    flag("--resume", metavar="RUN", nargs="?", const="auto", help="go on with a run: its id, its folder, or auto")
    flag("--max-restarts", metavar="N", help="start again so often after a failure, from the newest checkpoint")
    flag("--run-id", metavar="NAME", help="name of the run's folder (default: from the time)")
    flag("--runs-dir", metavar="DIR", help="where run folders are (default: runs)")
    flag("--topology", metavar="[HOST=]PATH", action="append", default=[], help="a saved topology, not the host's own")
    flag("--dry-run", action="store_true", help="print the plan and stop")
    flag("--json", action="store_true", help="the plan or the report as JSON")
    flag("--quiet", action="store_true", help="failures and the closing report only")


def _slurm_flags(parser: _Parser) -> None:
    flag = parser.flag
    flag("--slurm", action="store_true", help="submit this as a Slurm job of --nnodes nodes and follow it")
    flag("--partition", metavar="NAME", help="its partition")
    flag("--time", metavar="LIMIT", help="its time limit, as sbatch takes it")
    flag("--account", metavar="NAME", help="its account")
    flag("--qos", metavar="NAME", help="its quality of service")
    flag("--cpus-per-task", metavar="N", help="cpus of each rank (default: whole nodes)")
    flag("--sbatch", metavar="NAME=VALUE", action="append", default=[], help="another option of sbatch")
