"""Trains on labelled dictionary entries and measures the accuracy on held-out ones, base against tuned.

    python demos/labels.py [--runs-dir runs]

Run by ``make demo-labels``. The held-out entries are those that the training run itself kept apart.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from falcon_dist.config import ModelConfig
from falcon_dist.engine.native import load_model, load_tokenizer
from falcon_dist.foldoc import LABELS
from falcon_dist.packing import held_out
from falcon_dist.prepare import find_model
from falcon_dist.settings import load
from falcon_dist.sources import find_sources

BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a model did on the held-out entries."""

    among: float
    """Share right where only the labels compete."""
    free: float
    """Share right where every token of the vocabulary competes."""
    perplexity: float
    """Of the label's first token."""


def held_out_records(recipe: str) -> tuple[list[dict[str, str]], int]:
    """The recipe's held-out records and how many are left to train on."""
    data = load(recipe).data
    (source,) = find_sources(data)
    records = [dict(item.values) for item in source.items()]
    kept = [record for record in records if held_out(str(record[str(data.key_field)]), data.eval_share)]
    return kept, len(records) - len(kept)


@torch.no_grad()
def score(name: str, records: Sequence[dict[str, str]]) -> Score:
    """Accuracy of a model on records."""
    config = ModelConfig(name=name)
    place = find_model(config)
    tokenizer = load_tokenizer(place, config)
    model = load_model(place, config, "bf16").eval()
    firsts = [tokenizer(f" {label}", add_special_tokens=False)["input_ids"][0] for label in LABELS]
    assert len(set(firsts)) == len(LABELS)
    among = free = 0
    loss = 0.0
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        logits = _last_logits(model, tokenizer, [record["prompt"] for record in batch])
        for row, record in zip(logits, batch, strict=True):
            right = LABELS.index(record["label"])
            among += int(row[firsts].argmax()) == right
            free += int(row.argmax()) == firsts[right]
            loss -= float(row.log_softmax(-1)[firsts[right]])
    count = len(records)
    return Score(among=among / count, free=free / count, perplexity=math.exp(loss / count))


def _last_logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> torch.Tensor:
    """[B, V] fp32 logits behind each prompt."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float()


def main() -> int:
    """Trains, measures and prints the table; fails where the accuracy is below 0.80."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", default="runs")
    args = parser.parse_args()
    hf_logging.disable_progress_bar()
    start = time.monotonic()
    recipe, run_id = "labels", f"labels-{time.strftime('%Y%m%d-%H%M%S')}"
    records, training = held_out_records(recipe)
    flags = ["--recipe", recipe, "--nproc-per-node", "2", "--run-id", run_id, "--runs-dir", args.runs_dir]
    subprocess.run([str(Path(sys.executable).parent / "falcon-launch"), *flags], check=True)
    run = Path(args.runs_dir) / run_id
    report = json.loads((run / "report.json").read_text())
    print(f"run {report['run_id']}: {training:,} training entries, {len(records)} held out, never trained on")
    most = collections.Counter(record["label"] for record in records).most_common(1)[0]
    print(f"| model | accuracy of {len(LABELS)} labels | accuracy, any token | perplexity of the label |")
    print(f"|---|---|---|---|\n| majority class ({most[0]}) | {most[1] / len(records):.3f} | | |")
    (tuned,) = (run / "checkpoints").glob("step-*")
    for name, place in (("base", load(recipe).model.name), ("tuned", str(tuned))):
        found = score(place, records)
        print(f"| {name} | {found.among:.3f} | {found.free:.3f} | {found.perplexity:,.2f} |", flush=True)
    print(f"in {time.monotonic() - start:.0f} s")
    return 0 if found.free >= 0.8 else 1


if __name__ == "__main__":
    raise SystemExit(main())
