"""``falcon chat CKPT``: a talk with a model, on a terminal or through pipes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falcon_dist.affinity import unfold
from falcon_dist.chat_template import set_template
from falcon_dist.config import ModelConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.native import load_model, load_tokenizer
from falcon_dist.generate import Answer, Sampling, prompt_text, reply
from falcon_dist.monitor import read_prompts
from falcon_dist.packaged import PREFIX
from falcon_dist.prepare import find_model

STOP: Final = "stop"
RESET: Final = "/reset"
HELP: Final = f'Type a prompt. "{RESET}" begins a new talk, "{STOP}" ends.'
QUANTIZED: Final = ("int8", "int4")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The verb's own flags; ``_`` and ``-`` are the same."""
    parser = argparse.ArgumentParser(prog="falcon chat", description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("checkpoint", nargs="?", help="a checkpoint folder, or any model's folder or hub name")
    flag("--checkpoints", dest="checkpoint_flag", metavar="PATH", help="the same, as in 2023")
    flag("--max-length", "--max-new-tokens", type=int, default=200, help="longest answer in tokens (200)")
    flag("--top-k", type=int, default=10, help="choose among the k likeliest tokens; 1: greedy (10)")
    flag("--top-p", type=float, default=1.0, help="choose among the likeliest tokens of this share (1.0)")
    flag("--temperature", type=float, default=1.0, help="below 1 sharpens the choice (1.0)")
    flag("--repetition-penalty", type=float, default=1.0, help="above 1 avoids what was said (1.0)")
    flag("--seed", type=int, default=0, help="of the choice among likely tokens (0)")
    flag("--system", metavar="TEXT", help="the system's turn before each talk")
    flag("--template", metavar="NAME|FILE", help="a chat template instead of the model's")
    flag("--precision", choices=("bf16", "fp32"), default="bf16", help="of weights and compute (bf16)")
    flag("--quantize", choices=QUANTIZED, help="weights in 8 or 4 bits, made at start")
    flag("--cpus", metavar="LIST", help='run on these cpus only, as "0-3,8"')
    flag("--prompts", type=Path, metavar="FILE", help="answer these, each by itself, and end")
    flag("--json", action="store_true", help="one JSON object an answer")
    return parser.parse_args([_dashed(word) for word in argv])


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def chat(argv: Sequence[str]) -> int:
    """Talks until ``stop`` or the end of input, or answers a file of prompts.

    Raises:
        UserError: there is no such checkpoint, or a number is out of range.
    """
    import torch

    args = parse_args(argv)
    sampling = _sampling(args)
    prompts = read_prompts(args.prompts) if args.prompts else None
    if args.cpus:
        bind(args.cpus)
    torch.manual_seed(args.seed)
    model, tokenizer = load(args.checkpoint or args.checkpoint_flag, args)
    _check_system(args.system, tokenizer)
    talk = Talk(model, tokenizer, sampling, system=args.system)
    tell = _tell_json if args.json else _tell_text
    if prompts is not None:
        for prompt in prompts:
            talk.reset()
            if not args.json:
                print(f"> {prompt}")
            tell(prompt, talk.say)
        return 0
    if sys.stdin.isatty():
        print(HELP if tokenizer.chat_template else f"{HELP} The model has no chat template: each prompt is by itself.")
    _go_on(talk, tell, terminal=sys.stdin.isatty())
    return 0


def _go_on(talk: Talk, tell: Tell, *, terminal: bool) -> None:
    """Prompt after prompt; Ctrl-C on a terminal ends the answer that is being given, or at a prompt the talk."""
    for prompt in _lines(terminal):
        if prompt == RESET:
            talk.reset()
            continue
        try:
            tell(prompt, talk.say)
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\n[interrupted: this prompt is forgotten]", file=sys.stderr, flush=True)


def _check_system(text: str | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the model would never read the system's turn."""
    if not text:
        return
    if not tokenizer.chat_template:
        raise UserError(f'falcon chat: --system: the model has no chat template: "{text}"; give one with --template')
    try:
        prompt_text([_turn("system", text), _turn("user", "?")], tokenizer)
    except TemplateError as error:
        raise UserError(
            f'falcon chat: --system: the chat template refuses it: "{text}": {error}; leave it out, or give another '
            "template with --template"
        ) from error


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _sampling(args: argparse.Namespace) -> Sampling:
    for name in ("max_length", "top_k"):
        if getattr(args, name) < 1:
            raise UserError(f'falcon chat: --{name.replace("_", "-")} must be at least 1: "{getattr(args, name)}"')
    for name in ("temperature", "repetition_penalty"):
        if getattr(args, name) <= 0:
            raise UserError(f'falcon chat: --{name.replace("_", "-")} must be above 0: "{getattr(args, name)}"')
    if not 0 < args.top_p <= 1:
        raise UserError(f'falcon chat: --top-p must be above 0 and at most 1: "{args.top_p}"')
    return Sampling(
        max_new_tokens=args.max_length,
        top_k=args.top_k,
        top_p=args.top_p,
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
    )


def bind(cpus: str) -> None:
    """Keeps this process on some cpus, with a compute thread on each.

    Raises:
        UserError: the list is none, or names a cpu that this process may not use.
    """
    import torch

    allowed = os.sched_getaffinity(0)
    chosen = unfold(cpus)
    if not chosen or not chosen <= allowed:
        raise UserError(f'falcon chat: --cpus must be of those this process may use: "{cpus}"; as 0-3,8')
    os.sched_setaffinity(0, chosen)
    torch.set_num_threads(len(chosen))


def load(source: str | None, args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, ready to answer.

    Raises:
        UserError: there is no such model or template.
    """
    if source is None:
        raise UserError("falcon chat: which model? give a checkpoint folder, as runs/RUN/checkpoints/step-000500")
    if not source.startswith(PREFIX) and not Path(source).expanduser().is_dir():
        _check_hub_name(source)
    config = ModelConfig(name=source)
    place = find_model(config)
    tokenizer = load_tokenizer(place, config)
    set_template(tokenizer, args.template)
    model = load_model(place, config, args.precision).eval()
    if args.quantize:
        from falcon_dist.weight_only import quantize_layers, ready

        quantize_layers(model, args.quantize)
        ready(model)
    return model, tokenizer


def _check_hub_name(name: str) -> None:
    """Raises UserError for what is rather a folder that is not there.

    Of a single word the hub is asked once here: without a network, transformers asks for a minute.
    """
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or not ("/" in name or _is_on_hub(name)):
        raise UserError(f'falcon chat: no such folder: "{name}"')


def _is_on_hub(name: str) -> bool:
    from huggingface_hub import model_info, try_to_load_from_cache

    with contextlib.suppress(Exception):  # whatever its client raises, the model is not to be had
        return isinstance(try_to_load_from_cache(name, "config.json"), str) or bool(model_info(name, timeout=10))
    return False


class Talk:
    """What was said so far; as much of it as the model can read goes into the next answer."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        system: str | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._system = [_turn("system", system)] if system else []
        self._turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forgets all but the system's turn."""
        self._turns = []

    def say(self, prompt: str, emit: Callable[[str], None] | None = None) -> Answer:
        """The model's answer, which becomes part of the talk, and the prompt with it, when it is there."""
        turns = [*self._turns, _turn("user", prompt)]
        while len(turns) > 1 and self._too_long(turns):
            del turns[:2]
        found = reply(self._model, self._tokenizer, self._system + turns, self._sampling, emit)
        self._turns = [*turns, _turn("assistant", found.text)]
        return found

    def _too_long(self, turns: list[dict[str, str]]) -> bool:
        room = getattr(self._model.config, "max_position_embeddings", None)
        text = prompt_text(self._system + turns, self._tokenizer)
        tokens = len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return room is not None and tokens + self._sampling.max_new_tokens > room


Say = Callable[[str, Callable[[str], None] | None], Answer]
Tell = Callable[[str, Say], None]


def _tell_text(prompt: str, say: Say) -> None:
    found = say(prompt, lambda text: print(text, end="", flush=True))
    print(f"\n[{found.tokens} tokens in {found.seconds:.1f} s, {found.tokens_per_s:.1f} tokens/s]", flush=True)


def _tell_json(prompt: str, say: Say) -> None:
    found = say(prompt, None)
    told: dict[str, Any] = {
        "prompt": prompt,
        "answer": found.text,
        "tokens": found.tokens,
        "seconds": round(found.seconds, 3),
        "tokens_per_s": round(found.tokens_per_s, 2),
    }
    print(json.dumps(told, ensure_ascii=False), flush=True)


def _lines(terminal: bool) -> Iterator[str]:
    """Lines of input that say something, until STOP or the end; prompted for only on a terminal."""
    while True:
        try:
            print("> " if terminal else "", end="", flush=True)
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            if not terminal:
                raise
            line = ""
            print()
        if not line or line.strip() == STOP:
            return
        if line.strip():
            yield line.strip()
