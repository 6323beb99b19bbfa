"""Settings that mean nothing or cannot go together. The launcher looks before it plans, so torch is not imported."""

from __future__ import annotations

from falcon_dist.config import CheckpointConfig, TrainConfig
from falcon_dist.contract import UserError


def check_agreement(config: TrainConfig) -> None:
    """Raises UserError for the first setting that no run could follow, whatever its model and data."""
    _check_numbers(config.checkpoint)
    if config.strategy.startswith("zero"):
        check_zero_settings(config)
    if config.strategy == "full-lowmem" and config.precision != "bf16":
        raise UserError(f'precision: strategy "full-lowmem" trains bf16 weights: "{config.precision}"')


def _check_numbers(config: CheckpointConfig) -> None:
    if config.keep_last is not None and config.keep_last < 1:
        raise UserError(f'checkpoint.keep_last must be at least 1 or "none": "{config.keep_last}"')
    if config.failure_hours <= 0:
        raise UserError(f'checkpoint.failure_hours must be above 0: "{config.failure_hours:g}"')
    if config.keep_every < 0:
        raise UserError(f'checkpoint.keep_every must be at least 0: "{config.keep_every}"')


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
