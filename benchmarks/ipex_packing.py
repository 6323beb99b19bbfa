"""What packed weights save in a Llama step under Intel's extension: forward and backward, one thread, in turns.

    .venv-ipex/bin/python benchmarks/ipex_packing.py [--rounds 6]

Processor time of one thread, so that a busy machine does not decide. docs/ipex.md says what follows from it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time

import intel_extension_for_pytorch as ipex
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = LlamaConfig(
    vocab_size=16384,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=16,
)
TOKENS = 512


def optimized(model: LlamaForCausalLM, *, packed: bool) -> LlamaForCausalLM:
    """A copy that the extension has optimized for training."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"weights_prepack": packed, "split_master_weight_for_bf16": False, "fuse_update_step": False}
    ipex.optimize(model, dtype=torch.bfloat16, optimizer=optimizer, inplace=True, **settings)
    return model


def step_seconds(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Processor time of one forward and backward pass through the blocks."""
    start = time.process_time()
    model.model(tokens).last_hidden_state.float().pow(2).mean().backward()
    model.zero_grad()
    return time.process_time() - start


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plain = LlamaForCausalLM(SHAPE).to(torch.bfloat16).train()
    models = {"plain": optimized(plain, packed=False), "packed": optimized(plain, packed=True)}
    tokens = torch.randint(0, SHAPE.vocab_size, (1, TOKENS))
    taken: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):  # the first round warms up
        for name, model in models.items():
            seconds = step_seconds(model, tokens)
            if number:
                taken[name].append(seconds)
    medians = {name: round(statistics.median(values), 4) for name, values in taken.items()}
    print(json.dumps({"cpu_seconds": medians, "packed_saves": round(1 - medians["packed"] / medians["plain"], 4)}))


if __name__ == "__main__":
    main()
