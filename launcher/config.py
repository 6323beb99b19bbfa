"""LaunchConfig and its one loader: defaults < TOML recipe < flags. Errors name the place and the key."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import falcon_dist
from falcon_dist.agreement import check_agreement
from falcon_dist.config import TrainConfig, Value, build, check_known, flatten, keys_of, layered, own_of, parse_value
from falcon_dist.contract import EMERGENCY_GRACE_S
from launcher import earlier, env_file, jobsettings
from launcher.errors import UserError
from launcher.jobsettings import SlurmSettings
from launcher.patience import LEAST_S, STOP_GRACE_S
from launcher.redaction import is_secret, redact_value

Backend = Literal["auto", "gloo", "ccl", "ccl-intel"]
RECIPES: Final = Path(falcon_dist.__file__).parent / "recipes"
DEFAULT_RECIPE: Final = "demo"
NPROC_WORDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "auto": {"by_slots": True},
    "numa": {"by_slots": False, "ranks_per": "numa_node"},
    "socket": {"by_slots": False, "ranks_per": "socket"},
}
"""What may stand for a number of ranks, and what it means."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchSettings:
    """How ranks are started; the ``[launch]`` table of a recipe."""

    hostfile: str | None = None
    """File of the run's hosts; None: this machine alone."""
    hosts: str | None = None
    """The same as a list: "a,b:2,node[1-3]"."""
    include: str | None = None
    exclude: str | None = None
    nnodes: int | None = None
    """The first so many hosts; None: all. "MIN:MAX" also sets min_nodes."""
    min_nodes: int | None = None
    """With fewer hosts than there were a run goes on down to so many, once a host failed twice; None: with all only."""
    max_restarts: int = 0
    """How often a run that failed is started again, from its newest checkpoint that verifies."""
    hang_s: float = LEAST_S
    """A step is overdue after so many seconds, or five times the usual if that is longer; 0: never."""
    emergency_grace_s: float = EMERGENCY_GRACE_S
    """Seconds a surviving rank gets to save the last finished step when another one has failed; 0: none."""
    stop_grace_s: float = STOP_GRACE_S
    """Seconds ranks get to end the step they are in and to save when SIGUSR1 asks the launcher to make way."""
    max_requeues: int = 20
    """How often a Slurm job that had to make way asks to be started again."""
    nproc_per_node: int | None = None
    """Ranks on each node; None (written "auto"): its slots, or one for each ``ranks_per``."""
    ranks_per: Literal["numa_node", "socket"] = "numa_node"
    by_slots: bool = True
    """False (nproc_per_node is "numa" or "socket"): one for each ``ranks_per``; slots only say how many at most."""
    sockets: str | None = None
    """Use these sockets of each node only, as "0"."""
    numa_nodes: str | None = None
    """Use these NUMA nodes only, as "0-1"."""
    cores_list: str | None = None
    """Use these cpus only, as "0-27"."""
    ncores_per_rank: int | None = None
    """Compute cores of each rank; None: as many as there are."""
    use_logical_cores: bool = False
    """Ranks get all threads of their cores."""
    ccl_worker_count: int = 0
    """Cores of each rank kept free for oneCCL's workers."""
    memory_allocator: Literal["default", "tcmalloc", "jemalloc"] = "default"
    runs_dir: str = "runs"
    """Folder of all run folders."""
    run_id: str | None = None
    """Name of this run's folder; None: made from the time."""
    backend: Backend = "auto"
    """Collective backend of our own program; ccl-intel: oneccl_bindings_for_pytorch, where it is installed."""
    env: tuple[str, ...] = ()
    """NAME=VALUE, or NAME to take the value from the launcher's environment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Somebody else's program to run instead of ours."""

    module: bool
    """True: the first word is a module's name; False: a script's path."""
    argv: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """All that was asked for."""

    launch: LaunchSettings = field(default_factory=LaunchSettings)
    train: TrainConfig = field(default_factory=TrainConfig)
    slurm: SlurmSettings = field(default_factory=SlurmSettings)
    program: Program | None = None
    """None: our own training program."""
    resume_from: str | None = None
    """Run folder that is continued; None: a new run."""
    resume_step: int = 0
    """Step of the newest checkpoint it is known to have; 0: not known."""
    made_step: int = 0
    """Step of the newest checkpoint that the attempts before this one made: no person has had time to remove it."""
    left_out: tuple[str, ...] = ()
    """Settings of that run which a job has no use for."""
    notes: tuple[str, ...] = ()
    """What the user should be told about how this came to be."""

    def to_json(self) -> dict[str, Any]:
        """What ``config.json`` of a run holds. A secret given by ``--env`` is kept by its name only."""
        env = [_without_secret(item) for item in self.launch.env]
        launch = dataclasses.asdict(self.launch) | {"env": env}
        if self.program is not None:
            return {"launch": launch, "program": dataclasses.asdict(self.program)}
        return {"launch": launch, "train": dataclasses.asdict(self.train)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """What stood on the command line, not yet judged."""

    launch: Mapping[str, Value] = field(default_factory=dict)
    """Keys of LaunchSettings that were given."""
    slurm: Mapping[str, Value] = field(default_factory=dict)
    """Keys of SlurmSettings that were given."""
    sets: tuple[str, ...] = ()
    """``section.key=value`` in the order given."""
    env: tuple[str, ...] = ()
    env_file: str | None = None
    recipe: str | None = None
    resume: str | None = None
    """A run id, a run folder, or "auto"."""
    program: Program | None = None
    as_job: bool = False
    """To be submitted to Slurm, which chooses the hosts."""
    notes: tuple[str, ...] = ()
    """What the command line was translated into, for the user to be told."""


def load(flags: Flags) -> LaunchConfig:
    """The configuration these flags ask for; reads the recipe, the env file and the run to be resumed.

    Raises:
        UserError: a file is missing or no TOML, a key is not known, a value does not fit, values contradict each other.
    """
    given = _from_flags(flags)
    recipe, origin = _stood_upon(flags, given)
    folder, note = _resumed(flags.resume, recipe | given)
    values = earlier.settings(folder) if folder else {}
    left_out = earlier.leave_hosts_out(values) if flags.as_job else ()
    if not flags.as_job:
        earlier.leave_number_out(values)
    program = flags.program or _saved_program(folder)
    if flags.recipe or not folder:
        values |= recipe
    for key, other in (("launch.hosts", "launch.hostfile"), ("launch.hostfile", "launch.hosts")):
        if key in given:  # a resumed run may get other hosts, said in another way
            values.pop(other, None)
    values = layered(values, given)
    check_known(values, _known_keys())
    launch = _launch_settings(values, flags)
    if folder:
        launch = dataclasses.replace(launch, runs_dir=str(folder.parent), run_id=folder.name)
    train = build(TrainConfig, values)
    if program is None:  # before any host is asked, and before a job is submitted
        check_agreement(train)
    return LaunchConfig(
        launch=launch,
        train=train,
        slurm=jobsettings.of(values),
        program=program,
        resume_from=str(folder) if folder else None,
        resume_step=earlier.newest_step(folder) if folder else 0,
        left_out=left_out,
        notes=(*flags.notes, *(told for told in (note, "" if folder else origin) if told)),
    )


def _known_keys() -> list[str]:
    own = {"launch": keys_of(LaunchSettings), "slurm": keys_of(SlurmSettings)}
    return [*(f"{table}.{key}" for table, keys in own.items() for key in keys), *keys_of(TrainConfig)]


def _from_flags(flags: Flags) -> dict[str, Value]:
    given = {f"launch.{key}": value for key, value in flags.launch.items()}
    given |= {f"slurm.{key}": value for key, value in flags.slurm.items()}
    for item in flags.sets:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f'--set: not of the form section.key=value: "{item}"')
        given[key.strip()] = Value(parse_value(text), "--set")
    return given


def _launch_settings(values: Mapping[str, Value], flags: Flags) -> LaunchSettings:
    settings = build(LaunchSettings, {**values, **_in_words(values), **_range_of_nodes(values)}, "launch.")
    _check_launch(settings, values)
    env = (*settings.env, *env_file.lines(flags.env_file), *flags.env)
    return dataclasses.replace(settings, env=env)


def _in_words(values: Mapping[str, Value]) -> dict[str, Value]:
    """What a number of ranks given as a word means."""
    given = values.get("launch.nproc_per_node")
    if given is None or not isinstance(given.value, str) or given.value == "none":
        return {}
    if given.value not in NPROC_WORDS:
        known = ", ".join(f'"{word}"' for word in NPROC_WORDS)
        raise UserError(f'{given.source}: launch.nproc_per_node must be a number or {known}: "{given.value}"')
    meant = {"nproc_per_node": None, **NPROC_WORDS[given.value]}
    return {f"launch.{key}": Value(value, given.source) for key, value in meant.items()}


def _range_of_nodes(values: Mapping[str, Value]) -> dict[str, Value]:
    """What torchrun's ``--nnodes MIN:MAX`` means."""
    given = values.get("launch.nnodes")
    if given is None or not isinstance(given.value, str):
        return {}
    least, colon, most = given.value.partition(":")
    if not (colon and least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise UserError(f'{given.source}: launch.nnodes must be a number or MIN:MAX: "{given.value}"')
    return {"launch.nnodes": Value(int(most), given.source), "launch.min_nodes": Value(int(least), given.source)}


def _check_launch(settings: LaunchSettings, values: Mapping[str, Value]) -> None:
    if settings.nproc_per_node is not None and settings.nproc_per_node < 1:
        source = values["launch.nproc_per_node"].source
        raise UserError(f'{source}: launch.nproc_per_node must be "auto" or 1 or more: "{settings.nproc_per_node}"')
    if settings.nnodes is not None and (settings.min_nodes or 0) > settings.nnodes:
        source = values["launch.min_nodes"].source
        text = f'{source}: launch.min_nodes is more than the hosts, {settings.nnodes}: "{settings.min_nodes}"'
        raise UserError(f"{text}; give a lower --min-nodes")
    least_of = {"ncores_per_rank": 1, "ccl_worker_count": 0, "max_restarts": 0, "min_nodes": 1, "hang_s": 0}
    for key, least in {**least_of, "emergency_grace_s": 0, "stop_grace_s": 0, "max_requeues": 0}.items():
        number = getattr(settings, key)
        if number is not None and not least <= number < math.inf:
            raise UserError(f'{values[f"launch.{key}"].source}: launch.{key} must be {least} or more: "{number}"')
    if settings.hostfile is not None and settings.hosts is not None:
        raise UserError(f'--hostfile: not beside --hosts: "{settings.hostfile}"; give one of the two')
    if settings.run_id is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", settings.run_id):
        source = values["launch.run_id"].source
        raise UserError(
            f'{source}: launch.run_id names a folder: "{settings.run_id}"; use letters, digits, ".", "_", "-"'
        )


def _stood_upon(flags: Flags, given: Mapping[str, Value]) -> tuple[dict[str, Value], str]:
    """The recipe below the flags, and what the user should be told: the demo is taken whole or not at all."""
    named = own_of(given)
    if flags.recipe or not (flags.program or named):
        return _recipe(flags.recipe or DEFAULT_RECIPE), ""
    tables, defaults = {key.partition(".")[0] for key in named}, TrainConfig()
    names = {"model": defaults.model.name, "data": defaults.data.name}
    rest = "".join(f"; {table}.name is {name}" for table, name in names.items() if table not in tables)
    told = f"{' and '.join(named)} given without a recipe: all else is at its default, nothing as in the demo{rest}"
    return {}, "" if flags.program else told


def _recipe(name: str) -> dict[str, Value]:
    path = Path(name) if name.endswith(".toml") or "/" in name else RECIPES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml"))) or "none"
        raise UserError(f'--recipe: no such recipe: "{name}"; known: {known}; or give the path of a .toml file')
    try:
        return flatten(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise UserError(f"{path}: not TOML: {fault}") from fault


def _without_secret(item: str) -> str:
    name, equals, value = item.partition("=")
    keep_name_only = is_secret(name) or redact_value(name, value) != value
    return name if keep_name_only else f"{name}{equals}{value}"


def _resumed(resume: str | None, given: Mapping[str, Value]) -> tuple[Path | None, str | None]:
    """The run these settings name, wherever they were given, and what the user should be told."""
    if resume is None:
        return None, None
    names = {key: str(given[f"launch.{key}"].value) for key in ("runs_dir", "run_id") if f"launch.{key}" in given}
    return earlier.find(resume, Path(names.get("runs_dir", LaunchSettings().runs_dir)), names.get("run_id"))


def _saved_program(folder: Path | None) -> Program | None:
    saved = earlier.program(folder) if folder else None
    return Program(module=saved["module"], argv=tuple(saved["argv"])) if saved else None
