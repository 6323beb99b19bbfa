"""``falcon chat CKPT``: prompts in, streamed answers out, until ``stop``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from falcon_dist.config import ModelConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.native import load_model, load_tokenizer
from falcon_dist.generate import Sampling, answer

STOP = "stop"


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The verb's own flags; ``_`` and ``-`` are the same."""
    parser = argparse.ArgumentParser(prog="falcon chat", description=__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or any model folder")
    parser.add_argument("--max-length", type=int, default=200, help="longest answer in tokens (200)")
    parser.add_argument("--top-k", type=int, default=10, help="choose among the k likeliest tokens; 1: greedy (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice among likely tokens (0)")
    return parser.parse_args([_dashed(word) for word in argv])


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def chat(argv: Sequence[str]) -> int:
    """Talks until ``stop`` or the end of input; each prompt stands by itself.

    Raises:
        UserError: there is no such checkpoint, or a number is out of range.
    """
    import torch

    args = parse_args(argv)
    if not args.checkpoint.is_dir():
        raise UserError(f'falcon chat: no such folder: "{args.checkpoint}"')
    for name in ("max_length", "top_k"):
        if getattr(args, name) < 1:
            raise UserError(f'falcon chat: --{name.replace("_", "-")} must be at least 1: "{getattr(args, name)}"')
    torch.manual_seed(args.seed)
    config = ModelConfig(name=str(args.checkpoint))
    tokenizer = load_tokenizer(args.checkpoint, config)
    model = load_model(args.checkpoint, config, "bf16").eval()
    sampling = Sampling(max_new_tokens=args.max_length, top_k=args.top_k)
    if sys.stdin.isatty():
        print(f'Type a prompt; "{STOP}" ends.')
    for prompt in _prompts():
        start = time.monotonic()
        _, tokens = answer(model, tokenizer, prompt, sampling, emit=_emit)
        seconds = time.monotonic() - start
        print(f"\n[{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tokens/s]", flush=True)
    return 0


def _emit(text: str) -> None:
    print(text, end="", flush=True)


def _prompts() -> Iterator[str]:
    """Lines of input that say something, until STOP or the end; prompted for only on a terminal."""
    invite = "> " if sys.stdin.isatty() else ""
    while True:
        print(invite, end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == STOP:
            return
        if line.strip():
            yield line.strip()
