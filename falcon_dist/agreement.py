"""Settings that mean nothing or cannot go together. The launcher looks before it plans, so torch is not imported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Final

from falcon_dist.config import TrainConfig, flatten
from falcon_dist.contract import UserError
from falcon_dist.layout import parse_size

_LEAST: Final = {
    "checkpoint.every": 0,
    "checkpoint.keep_every": 0,
    "checkpoint.keep_last": 1,
    "data.max_length": 2,
    "data.max_records": 1,
    "evaluate.every": 0,
    "evaluate.max_new_tokens": 1,
    "evaluate.min_gain": 0,
    "evaluate.patience": 1,
    "lora.rank": 1,
    "loop.check_replicas": 0,
    "loop.global_batch": 1,
    "loop.grad_accum": 1,
    "loop.max_steps": 1,
    "loop.micro_batch": 1,
    "optim.lr": 0,
    "optim.max_grad_norm": 0,
    "optim.warmup_steps": 0,
    "optim.weight_decay": 0,
    "report.log_every": 0,
    "report.profile": 0,
}
_SPANS: Final = {
    "optim.warmup_share": (0, 1),
    "seed": (0, 2**32 - 1),  # what every generator takes: numpy's is the narrowest
}
_ABOVE_0: Final = ("checkpoint.failure_hours", "loop.epochs", "optim.eps")
_SHARES: Final = ("data.eval_share", "lora.dropout", "optim.beta1", "optim.beta2")
_NONE_TOO: Final = ("checkpoint.keep_last", "data.max_records", "evaluate.patience")
"""Where "none" is what somebody who gave too little may have wanted."""


def check_agreement(config: TrainConfig) -> None:
    """Raises UserError for the first setting that no run could follow, whatever its model and data."""
    check_numbers(dataclasses.asdict(config))
    parse_size(config.checkpoint.max_shard_size)
    if config.strategy.startswith("zero"):
        check_zero_settings(config)
    if config.strategy == "full-lowmem" and config.precision != "bf16":
        raise UserError(f'precision: strategy "full-lowmem" trains bf16 weights: "{config.precision}"')
    evaluate = config.evaluate
    if evaluate.patience is not None and not evaluate.every:
        raise UserError("evaluate.patience counts evaluations along the way: set evaluate.every")


def check_numbers(settings: Mapping[str, Any]) -> None:
    """Raises UserError for the first number out of its range in nested tables of settings, all of them or some."""
    for key, (value, _) in flatten(settings, "").items():
        if value is None:
            continue
        if key in _LEAST and not value >= _LEAST[key]:  # which "not a number" is not either
            none = ' or "none"' if key in _NONE_TOO else ""
            raise UserError(f'{key} must be at least {_LEAST[key]}{none}: "{value}"')
        if key in _ABOVE_0 and not value > 0:
            raise UserError(f'{key} must be above 0: "{value}"')
        if key in _SHARES and not 0 <= value < 1:
            raise UserError(f'{key} must be from 0 to below 1: "{value}"')
        if key in _SPANS and not _SPANS[key][0] <= value <= _SPANS[key][1]:
            least, most = _SPANS[key]
            raise UserError(f'{key} must be from {least} to {most}: "{value}"')
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f'{key} must be finite: "{value}"')


def check_zero_settings(config: TrainConfig) -> None:
    """Raises UserError for settings that no stage of ZeRO can follow."""
    name = config.strategy
    if config.precision == "bf16-autocast":
        raise UserError(f'precision: strategy "{name}" trains bf16 or fp32 weights: "{config.precision}"')
    if config.engine.kind != "native":
        raise UserError(f'engine.kind: strategy "{name}" runs on torch\'s own kernels: "{config.engine.kind}"')
    if config.checkpoint.background == "on":
        raise UserError(
            f'checkpoint.background: strategy "{name}" gathers its state while all ranks wait: "on"; set auto or off'
        )
