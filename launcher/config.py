"""LaunchConfig and its one loader: defaults < TOML recipe < flags. Errors name the place and the key."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import falcon_dist
from falcon_dist.agreement import check_agreement
from falcon_dist.config import TrainConfig, Value, build, check_known, flatten, keys_of, layered, own_of, parse_value
from launcher import earlier, env_file, jobsettings, launchsettings
from launcher.errors import UserError
from launcher.jobsettings import SlurmSettings
from launcher.launchsettings import LaunchSettings
from launcher.redaction import is_secret, redact_value

RECIPES: Final = Path(falcon_dist.__file__).parent / "recipes"
DEFAULT_RECIPE: Final = "demo"


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
    train: Mapping[str, Value] = field(default_factory=dict)
    """Keys of TrainConfig that have flags of their own."""
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
    else:
        _check_unread(given)
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
    given |= {f"slurm.{key}": value for key, value in flags.slurm.items()} | dict(flags.train)
    for item in flags.sets:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f'--set: not of the form section.key=value: "{item}"')
        given[key.strip()] = Value(parse_value(text), "--set")
    return given


def _launch_settings(values: Mapping[str, Value], flags: Flags) -> LaunchSettings:
    settings = launchsettings.of(values)
    env = (*settings.env, *env_file.lines(flags.env_file), *flags.env)
    return dataclasses.replace(settings, env=env)


def _check_unread(given: Mapping[str, Value]) -> None:
    for key, (value, source) in given.items():
        if not key.startswith(("launch.", "slurm.")) or (key == "launch.backend" and value != "auto"):
            told = f'{source}: {key} is for our own program, and yours does not read it: "{value}"'
            raise UserError(f"{told}; leave it out, or give your program an argument of its own")


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
