"""Settings that cannot go together are refused by their names, on any machine, before anything is prepared."""

from __future__ import annotations

import math

import pytest

from falcon_dist.agreement import check_agreement
from falcon_dist.config import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    LoopConfig,
    LoraConfig,
    OptimConfig,
    TrainConfig,
)
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
    'checkpoint.max_shard_size must be a size as in "200MB" or "2GB": "5G"': TrainConfig(
        checkpoint=CheckpointConfig(max_shard_size="5G")
    ),
    'checkpoint.every must be at least 0: "-1"': TrainConfig(checkpoint=CheckpointConfig(every=-1)),
    'loop.check_replicas must be at least 0: "-1"': TrainConfig(loop=LoopConfig(check_replicas=-1)),
    'optim.max_grad_norm must be at least 0: "-1"': TrainConfig(optim=OptimConfig(max_grad_norm=-1)),
    'optim.lr must be at least 0: "nan"': TrainConfig(optim=OptimConfig(lr=math.nan)),
    'optim.beta2 must be from 0 to below 1: "1.0"': TrainConfig(optim=OptimConfig(beta2=1.0)),
    'data.max_records must be at least 1 or "none": "-1"': TrainConfig(data=DataConfig(max_records=-1)),
    'evaluate.max_new_tokens must be at least 1: "0"': TrainConfig(evaluate=EvaluateConfig(max_new_tokens=0)),
    'evaluate.patience must be at least 1 or "none": "0"': TrainConfig(evaluate=EvaluateConfig(patience=0, every=1)),
    'evaluate.every must be at least 0: "-1"': TrainConfig(evaluate=EvaluateConfig(every=-1)),
    "evaluate.patience counts evaluations along the way": TrainConfig(evaluate=EvaluateConfig(patience=1)),
    'checkpoint.failure_hours must be finite: "inf"': TrainConfig(checkpoint=CheckpointConfig(failure_hours=math.inf)),
    'loop.epochs must be finite: "inf"': TrainConfig(loop=LoopConfig(epochs=math.inf)),
    'lora.alpha must be finite: "nan"': TrainConfig(lora=LoraConfig(alpha=math.nan)),
    'optim.warmup_share must be from 0 to 1: "nan"': TrainConfig(optim=OptimConfig(warmup_share=math.nan)),
    'optim.warmup_share must be from 0 to 1: "5.0"': TrainConfig(optim=OptimConfig(warmup_share=5.0)),
    'seed must be from 0 to 4294967295: "-1"': TrainConfig(seed=-1),
    'seed must be from 0 to 4294967295: "4294967296"': TrainConfig(seed=2**32),
    'lora.dropout must be from 0 to below 1: "1.0"': TrainConfig(lora=LoraConfig(dropout=1.0)),
}


@pytest.mark.parametrize("fault", ODD)
def test_what_cannot_be_followed_is_refused(fault: str) -> None:
    with pytest.raises(UserError) as error:
        check_agreement(ODD[fault])
    assert str(error.value).startswith(fault)


def test_what_can_be_is_not() -> None:
    for config in (TrainConfig(), TrainConfig(strategy="zero3", precision="fp32"), TrainConfig(strategy="full-lowmem")):
        check_agreement(config)
