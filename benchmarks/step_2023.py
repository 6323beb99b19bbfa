"""The contender of step.py that runs in the environment of `make bench-venv`: the 2023 recipe as its users have it.

fp32 weights under bf16 autocast and --use_ipex True, which hands model and AdamW to ipex.optimize. Its TRL's loss takes
entropy and accuracy of every step besides; "plain" is the same with transformers' own loss, as TRL's was in 2023. Rows
of several samples see each other, as they did.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import step_rows
import torch
from datasets import Dataset
from transformers import Trainer, default_data_collator
from trl import SFTConfig, SFTTrainer


class PlainLoss(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with a loss as it had in 2023."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own."""
        return Trainer.compute_loss(self, *args, **kwargs)


def main() -> None:
    """step_2023.py trl|plain SHAPE ROWS TOKENS THREADS"""
    loss, shape, rows, length, threads = *sys.argv[1:3], *map(int, sys.argv[3:6])
    torch.set_num_threads(threads)
    tokens = step_rows.make_tokens(shape, length).astype("int64")
    whole = {"input_ids": tokens, "labels": tokens, "attention_mask": tokens * 0 + 1}
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"trl": SFTTrainer, "plain": PlainLoss}[loss](
            model=step_rows.make_model(shape, "sdpa", "float32"),
            args=settings(folder, rows),
            train_dataset=Dataset.from_dict({name: list(array) for name, array in whole.items()}),
            data_collator=default_data_collator,
            processing_class=step_rows.make_tokenizer(),
        )
        step_rows.run(trainer, torch=torch.__version__)


def settings(folder: str, rows: int) -> SFTConfig:
    """As the recipe's command line gives them."""
    return SFTConfig(
        output_dir=folder,
        use_cpu=True,
        use_ipex=True,
        bf16=True,
        optim="adamw_torch",
        per_device_train_batch_size=rows,
        max_steps=10_000,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


if __name__ == "__main__":
    main()
