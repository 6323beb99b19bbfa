"""Contenders of step.py that run in this environment, ours and stock transformers, each a process of its own."""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import step_rows
import torch
from peft import LoraConfig
from transformers import Trainer
from trl import SFTTrainer

from falcon_dist.config import LoopConfig, Precision, TrainConfig
from falcon_dist.engine import widened
from falcon_dist.engine.attention import SEGMENTS, register
from falcon_dist.engine.form import TrainingForm, choose
from falcon_dist.engine.peak import step_flops
from falcon_dist.learning_rate import make_scheduler
from falcon_dist.loop import PackedTrainer, RowCollator
from falcon_dist.masking import Masking
from falcon_dist.order import Schedule, plan_schedule
from falcon_dist.rows import Part
from falcon_dist.soundness import Soundness
from falcon_dist.step_clock import StepClock
from falcon_dist.strategy.choice import make_strategy
from falcon_dist.strategy.lora import ATTENTION_LAYERS
from falcon_dist.trainer_settings import row_stream, trainer_settings
from falcon_dist.world import World

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
"""Of our weights, by precision."""


class PlainLoss(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with transformers' own loss: TRL's is several times slower on CPUs."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own."""
        return Trainer.compute_loss(self, *args, **kwargs)


def main() -> None:
    """step_trainers.py WAY STRATEGY SHAPE ROWS TOKENS THREADS"""
    way, strategy, shape, *numbers = sys.argv[1:7]
    rows, length, threads = map(int, numbers)
    torch.set_num_threads(threads)
    config = TrainConfig(loop=LoopConfig(micro_batch=rows, max_steps=10_000), strategy=strategy)  # type: ignore[arg-type]
    schedule = plan_schedule(config.loop, num_rows=step_rows.ROWS, world_size=1, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        precision: Precision = "fp32" if way.endswith("-fp32") else "bf16" if way == "ours" else "bf16-autocast"
        make = our_trainer if way.startswith("ours") else stock_trainer
        trainer = make(replace(config, precision=precision), schedule, shape, length, folder)
        form = getattr(trainer, "form", None)
        with form.training() if form else nullcontext():
            step_rows.run(trainer, flops_per_token=step_flops(trainer.model))


def make_part(shape: str, length: int) -> Part:
    """Packed rows of random tokens."""
    tokens = step_rows.make_tokens(shape, length)
    records = np.broadcast_to(np.arange(length, dtype=np.int32) // step_rows.SEGMENT, tokens.shape)
    return Part(tokens, records, np.ones(tokens.shape, dtype=np.uint8))


def our_trainer(config: TrainConfig, schedule: Schedule, shape: str, length: int, folder: str) -> Any:
    """As falcon_dist.train puts it together: segment attention, chunked head, bf16 weights with fp32 masters."""
    register()
    widened.install()
    model, clock = step_rows.make_model(shape, SEGMENTS, DTYPES[config.precision]), StepClock()
    strategy = make_strategy(config, World())
    strategy.ready(model)
    form = TrainingForm(model, choose(model.config, config.model, config.engine))
    optimizer = strategy.make_optimizer(model)
    with form.training():
        masking = Masking.of(model)
    return PackedTrainer(
        form=form,
        clock=clock,
        soundness=Soundness(schedule, World(), 0),
        model=model,
        args=trainer_settings(config, schedule, 0, folder, **strategy.settings()),
        train_dataset=row_stream(schedule, 0),
        data_collator=RowCollator(make_part(shape, length), masking, clock),
        processing_class=step_rows.make_tokenizer(),
        optimizers=(optimizer, make_scheduler(optimizer, config.optim, schedule, 0)),
    )


def stock_trainer(config: TrainConfig, schedule: Schedule, shape: str, length: int, folder: str) -> Any:
    """SFTTrainer, fp32 weights, sdpa with the packed mask, fused AdamW, transformers' own loss."""
    model = step_rows.make_model(shape, "sdpa", "float32")
    adapters = LoraConfig(r=16, lora_alpha=32, target_modules=list(ATTENTION_LAYERS[model.config.model_type]))
    return PlainLoss(
        model=model,
        args=trainer_settings(config, schedule, 0, folder, optim="adamw_torch_fused"),
        train_dataset=row_stream(schedule, 0),
        data_collator=RowCollator(make_part(shape, length), Masking.of(model), StepClock()),
        processing_class=step_rows.make_tokenizer(),
        peft_config=adapters if config.strategy == "lora" else None,
    )


if __name__ == "__main__":
    main()
