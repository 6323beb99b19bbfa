"""Small real models and a tokenizer, made on the spot: stock transformers classes, random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 512
TEXT = [
    "### Human: What is a socket?### Assistant: A processor package on the board, with its own memory.",
    "### Human: Why pin cores?### Assistant: So that threads stay beside the memory they use.",
    "The quick brown fox jumps over the lazy dog while forty-two falcons circle above the data centre.",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_FALCON = {"vocab_size": VOCAB, "num_hidden_layers": 2, "hidden_size": 64, "max_position_embeddings": 2048}


def falcon_7b(**changes: object) -> FalconConfig:
    """One key head for all (multi-query), attention beside the MLP, rotary."""
    return FalconConfig(**{**_FALCON, "num_attention_heads": 4, "multi_query": True, **changes})


def falcon_40b(**changes: object) -> FalconConfig:
    """Grouped key heads, two layer norms in parallel, rotary."""
    shape = {"num_attention_heads": 8, "num_kv_heads": 2, "new_decoder_architecture": True}
    return FalconConfig(**{**_FALCON, **shape, **changes})


def falcon_rw(**changes: object) -> FalconConfig:
    """One key head each, sequential blocks, biases; alibi unless changed."""
    shape = {"num_attention_heads": 4, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True}
    return FalconConfig(**{**_FALCON, **shape, **changes})


def llama(**changes: object) -> LlamaConfig:
    """Grouped key heads, gated MLP."""
    shape = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    return LlamaConfig(**{**_FALCON, **shape, **changes})


SHAPES = {"falcon-7b": falcon_7b, "falcon-40b": falcon_40b, "falcon-rw": falcon_rw, "llama": llama}


def make_model(config: FalconConfig | LlamaConfig, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    kind = FalconForCausalLM if isinstance(config, FalconConfig) else LlamaForCausalLM
    model = kind._from_config(config, attn_implementation=attention)
    # transformers' small initial weights make every logit alike: a leak would drown in them.
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim >= 2:
                param.normal_(0, 0.1)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = TEMPLATE
    return fast


def write_model(folder: Path, config: FalconConfig | LlamaConfig | None = None) -> Path:
    """A model folder as a hub would give it."""
    make_model(config or falcon_7b()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_adapters(folder: Path, base: Path, **told: object) -> Path:
    """Adapters as a LoRA run leaves them, beside a tokenizer; ``told`` goes into their config too."""
    from peft import LoraConfig  # slow, and needed here only

    model = AutoModelForCausalLM.from_pretrained(base)
    model.add_adapter(LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | told))
    return folder
