"""What the contenders of step.py have in common, on either stack: the model's shape, its rows, and taking turns."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "falcon-80m": {
        "model_type": "falcon",
        "hidden_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "vocab_size": 16384,
        "multi_query": True,
        "max_position_embeddings": 2048,
    },
    "falcon-160m": {
        "model_type": "falcon",
        "hidden_size": 2048,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "vocab_size": 16384,
        "multi_query": True,
        "max_position_embeddings": 2048,
    },
    "demo": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    },
}
"""demo: that of SmolLM2-135M, which the demo trains."""
ROWS: Final = 64
SEGMENT: Final = 170
"""Tokens of a packed sample: three to a row of 512, and a short one."""


def make_model(shape: str, attention: str, dtype: str) -> Any:
    """Random weights in the shape."""
    import torch
    from transformers import AutoConfig, FalconForCausalLM, LlamaForCausalLM

    torch.manual_seed(0)
    plan = AutoConfig.for_model(**SHAPES[shape])
    kind = {"falcon": FalconForCausalLM, "llama": LlamaForCausalLM}[plan.model_type]
    return kind._from_config(plan, attn_implementation=attention).to(getattr(torch, dtype)).train()


def make_tokenizer() -> Any:
    """One that the trainers ask for and nobody uses."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    end = "<end>"
    words = Tokenizer(models.WordLevel({end: 0}, unk_token=end))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end)


def make_tokens(shape: str, length: int) -> npt.NDArray[np.int32]:
    """[ROWS, length] random tokens."""
    return np.random.default_rng(0).integers(0, SHAPES[shape]["vocab_size"], (ROWS, length), dtype=np.int32)


def run(trainer: Any, **facts: object) -> None:
    """Tells that the trainer is made, then trains as long as it is told to take steps."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # what it prints would be taken for an answer
    trainer.add_callback(_pace())
    print(json.dumps(facts), flush=True)
    trainer.train()


def _pace() -> Any:
    """A callback that waits for its turn before a step, and tells how long the turn took, to the next step's begin."""
    from transformers import TrainerCallback

    class Pace(TrainerCallback):  # type: ignore[misc]
        left = 0
        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.left:
                if self.began:
                    print(json.dumps({"seconds": time.perf_counter() - self.began}), flush=True)
                line = sys.stdin.readline()
                if not line:
                    os._exit(0)
                self.left, self.began = int(line), time.perf_counter()
            self.left -= 1

    return Pace()
