"""A TrainConfig for verbs that are no run of their own: from a run's config.json or a recipe, and ``--set``."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from falcon_dist.config import TrainConfig, Value, build, check_known, flatten, keys_of, layered, own_of
from falcon_dist.contract import UserError
from falcon_dist.values import parse_value

DEMO: Final = "demo"
RECIPES: Final = Path(__file__).parent / "recipes"


def read_config(path: Path) -> TrainConfig:
    """The "train" part of a run's config.json.

    Raises:
        UserError: the file is missing, no JSON, or has a value that does not fit.
    """
    return _build(_from_json(path))


def load(source: str | None, sets: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a run folder, a config.json, a recipe by name or file, or the defaults; then ``sets``.

    Raises:
        UserError: there is no such source, or a value does not fit.
    """
    given: dict[str, Value] = {}
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f'--set: not of the form section.key=value: "{item}"')
        given[key.strip()] = Value(parse_value(text), "--set")
    return _build(layered({} if source is None else _from_source(source), given))


def default_source(sets: Sequence[str]) -> str | None:
    """What falcon-launch stands upon without a recipe: the demo, or no more than the defaults."""
    return None if own_of([item.partition("=")[0].strip() for item in sets]) else DEMO


def _from_source(source: str) -> dict[str, Value]:
    path = Path(source)
    if path.is_dir():
        return _from_json(path / "config.json")
    if path.suffix == ".json":
        return _from_json(path)
    recipe = path if path.suffix == ".toml" or "/" in source else RECIPES / f"{source}.toml"
    try:
        values = flatten(tomllib.loads(recipe.read_text(encoding="utf-8")), str(recipe))
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
        raise UserError(f'no such run or recipe: "{source}"; known recipes: {known}') from error
    except ValueError as error:
        raise UserError(f"{recipe}: not TOML: {error}") from error
    return {key: value for key, value in values.items() if not key.startswith(("launch.", "slurm."))}


def _from_json(path: Path) -> dict[str, Value]:
    try:
        return flatten(json.loads(path.read_text())["train"], str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f'{path}: cannot read the run\'s config: "{error}"') from error


def _build(values: dict[str, Value]) -> TrainConfig:
    check_known(values, keys_of(TrainConfig))
    return build(TrainConfig, values)
