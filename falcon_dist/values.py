"""Dotted values from layers -> a frozen configuration; each value keeps where it was written.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from falcon_dist.contract import UserError

T = TypeVar("T")


class Value(NamedTuple):
    """One configured value and the place it was written."""

    value: Any
    source: str
    """As shown in errors: ``recipes/demo.toml`` or ``--set``."""


def parse_value(text: str) -> Any:
    """The TOML value written in ``text``, or else the text itself.

    >>> parse_value("2e-5"), parse_value("[1, 2]"), parse_value("./my.jsonl")
    (2e-05, [1, 2], './my.jsonl')
    """
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return table["value"] if set(table) == {"value"} else text


def flatten(mapping: Mapping[str, Any], source: str, prefix: str = "") -> dict[str, Value]:
    """Nested tables -> {"data.name": Value(...)}."""
    flat: dict[str, Value] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, source, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = Value(value, source)
    return flat


def keys_of(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key a configuration class takes, with its type."""
    hints = typing.get_type_hints(cls)
    keys: dict[str, Any] = {}
    for name in (f.name for f in dataclasses.fields(cls)):
        if dataclasses.is_dataclass(hints[name]):
            keys.update(keys_of(hints[name], f"{prefix}{name}."))
        else:
            keys[f"{prefix}{name}"] = hints[name]
    return keys


def check_known(values: Mapping[str, Value], known: Iterable[str]) -> None:
    """Raises UserError for the first key that is not known, with the nearest one that is."""
    known = list(known)
    for key, (_, source) in values.items():
        if key not in known:
            raise UserError(f'{source}: unknown key "{key}"; {_nearest(key, known)}')


def _nearest(key: str, known: list[str]) -> str:
    tails = {k.rsplit(".", 1)[-1]: k for k in known}
    near = difflib.get_close_matches(key, known, 1, 0.6)
    near = near or [tails[t] for t in difflib.get_close_matches(key.rsplit(".", 1)[-1], tails, 1, 0.6)]
    return (
        f'did you mean "{near[0]}"?'
        if near
        else f"known sections: {', '.join(sorted({k.split('.')[0] for k in known}))}"
    )


def build(cls: type[T], values: Mapping[str, Value], prefix: str = "") -> T:
    """A configuration from dotted values; what is not given keeps its default.

    Raises:
        UserError: a value does not fit its key's type; names source, key, value and what fits.
    """
    hints = typing.get_type_hints(cls)
    given: dict[str, Any] = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(hints[f.name]):
            given[f.name] = build(hints[f.name], values, f"{key}.")
        elif key in values:
            given[f.name] = _fit(hints[f.name], values[key], key)
    return cls(**given)


def _fit(kind: Any, value: Value, key: str) -> Any:
    # "none" is no text where there may be none.
    for choice in sorted(_choices(kind), key=lambda choice: choice is not type(None)):
        fitted = _fit_one(choice, value.value)
        if fitted is not _MISFIT:
            return fitted
    raise UserError(f'{value.source}: {key} must be {_describe(kind)}: "{value.value}"')


_MISFIT = object()


def _choices(kind: Any) -> tuple[Any, ...]:
    union = isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
    return typing.get_args(kind) if union else (kind,)


def _fit_one(kind: Any, raw: Any) -> Any:
    if kind is type(None):
        return None if raw is None or raw == "none" else _MISFIT
    if typing.get_origin(kind) is Literal:
        return raw if raw in typing.get_args(kind) else _MISFIT
    if typing.get_origin(kind) is tuple:
        fits = isinstance(raw, list | tuple) and all(isinstance(x, str) for x in raw)
        return tuple(raw) if fits else _MISFIT
    return _fit_scalar(kind, raw)


def _fit_scalar(kind: Any, raw: Any) -> Any:
    if kind is bool:
        return raw if isinstance(raw, bool) else {"true": True, "false": False}.get(str(raw).lower(), _MISFIT)
    if kind is float and isinstance(raw, int | float) and not isinstance(raw, bool):
        return float(raw)
    if kind is int and isinstance(raw, int) and not isinstance(raw, bool):
        return raw
    if kind is str and isinstance(raw, str | int | float):
        return str(raw)
    return _MISFIT


def _describe(kind: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): '"none"',
    }
    parts = []
    for choice in _choices(kind):
        literal = typing.get_origin(choice) is Literal
        options = " or ".join(f'"{x}"' for x in typing.get_args(choice)) if literal else ""
        parts.append(options or names.get(choice, "a list of texts"))
    return " or ".join(parts)
