"""What TRL's trainer is told: rows in our order, and nothing of what it would save, log or shuffle itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig

from falcon_dist.config import TrainConfig
from falcon_dist.order import Schedule


def row_stream(schedule: Schedule, start: int) -> Dataset:
    """The numbers of all rows from step ``start`` on, in training order: what SFTTrainer walks through."""
    steps = range(start, schedule.total_steps)
    return Dataset.from_dict({"row": [row for step in steps for row in schedule.rows_of_step(step)]})


def trainer_settings(
    config: TrainConfig, schedule: Schedule, start: int, output_dir: str, **of_strategy: Any
) -> SFTConfig:
    """SFTConfig for rows that are ready as they are; what it would save, log or shuffle itself is turned off."""
    settings = {
        "output_dir": output_dir,
        "run_name": Path(output_dir).name,
        "use_cpu": True,
        "bf16": config.precision == "bf16-autocast",
        "per_device_train_batch_size": config.loop.micro_batch,
        "gradient_accumulation_steps": schedule.grad_accum,
        "max_steps": schedule.total_steps - start,
        "max_grad_norm": config.optim.max_grad_norm or math.inf,  # without a bound the norm is still looked at
        "gradient_checkpointing": config.loop.grad_checkpointing,
        "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "max_length": None,
        "packing": False,
        "seed": config.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        # Without it DDP orders its buckets anew after its first step, and with them the sums over three ranks or more:
        # a resumed run would have other bits than one that was never stopped. Two ranks' sums have one order only.
        "ddp_find_unused_parameters": schedule.world_size > 2,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},  # the other kind does not go with it
        "ddp_broadcast_buffers": False,  # they are constants; sending them would make every rank wait for rank 0
        "dataloader_pin_memory": False,
        "router_aux_loss_coef": 0.0,  # what balances experts would be computed from a mask of another form than ours
    }
    return SFTConfig(**{**settings, **of_strategy})
