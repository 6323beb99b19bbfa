"""Settings that cannot go together are refused by their names, on any machine, before anything is prepared."""

from __future__ import annotations

import pytest

from falcon_dist.agreement import check_agreement
from falcon_dist.config import CheckpointConfig, EngineConfig, TrainConfig
from falcon_dist.contract import UserError

ODD = {
    'precision: strategy "zero2" trains bf16 or fp32 weights: "bf16-autocast"': TrainConfig(
        strategy="zero2", precision="bf16-autocast"
    ),
    'engine.kind: strategy "zero3" runs on': TrainConfig(strategy="zero3", engine=EngineConfig(kind="ipex")),
    'checkpoint.background: strategy "zero1"': TrainConfig(
        strategy="zero1", checkpoint=CheckpointConfig(background="on")
    ),
    'precision: strategy "full-lowmem" trains bf16 weights: "fp32"': TrainConfig(
        strategy="full-lowmem", precision="fp32"
    ),
    'checkpoint.keep_last must be at least 1 or "none": "0"': TrainConfig(checkpoint=CheckpointConfig(keep_last=0)),
    'checkpoint.keep_every must be at least 0: "-1"': TrainConfig(checkpoint=CheckpointConfig(keep_every=-1)),
    'checkpoint.failure_hours must be above 0: "0"': TrainConfig(checkpoint=CheckpointConfig(failure_hours=0)),
}


@pytest.mark.parametrize("fault", ODD)
def test_what_cannot_be_followed_is_refused(fault: str) -> None:
    with pytest.raises(UserError) as error:
        check_agreement(ODD[fault])
    assert str(error.value).startswith(fault)


def test_what_can_be_is_not() -> None:
    for config in (TrainConfig(), TrainConfig(strategy="zero3", precision="fp32"), TrainConfig(strategy="full-lowmem")):
        check_agreement(config)
