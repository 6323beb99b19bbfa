"""A model's answer to a talk or a prompt, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from falcon_dist.chat_template import Messages


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 200
    top_k: int = 1
    """1 takes the likeliest token each time; above that, one of the k likeliest by chance."""
    top_p: float = 1.0
    """Only the likeliest tokens that make up this share of the chance (Holtzman et al. 2020, arXiv:1904.09751)."""
    temperature: float = 1.0
    """Below 1 sharpens the choice, above 1 flattens it."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were said already less likely (Keskar et al. 2019, arXiv:1909.05858)."""

    def settings(self) -> dict[str, Any]:
        """As ``generate`` of transformers takes them."""
        common = {"max_new_tokens": self.max_new_tokens, "repetition_penalty": self.repetition_penalty}
        if self.top_k == 1:
            return {**common, "do_sample": False, "top_k": None, "top_p": None, "temperature": None}
        chosen = {"top_k": self.top_k, "top_p": self.top_p, "temperature": self.temperature}
        return {**common, "do_sample": True, **chosen}


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model said and what it took."""

    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


class Held:
    """Text on its way to ``emit``, held back where it may be the begin of the stop mark."""

    def __init__(self, stop: str | None, emit: Callable[[str], None]) -> None:
        self._stop = stop or ""
        self._emit = emit
        self._waiting = ""

    def add(self, text: str, *, last: bool = False) -> None:
        """Emits what cannot belong to a stop mark any more."""
        self._waiting += text
        if self._stop and self._stop in self._waiting:
            self._waiting = self._waiting.partition(self._stop)[0]
            last = True
        ready = len(self._waiting) if last else self._settled()
        if ready:
            self._emit(self._waiting[:ready])
            self._waiting = self._waiting[ready:]

    def _settled(self) -> int:
        """How many characters can be no begin of the stop mark."""
        for size in range(min(len(self._stop) - 1, len(self._waiting)), 0, -1):
            if self._stop.startswith(self._waiting[-size:]):
                return len(self._waiting) - size
        return len(self._waiting)


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands finished text on as it comes, the prompt left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, held: Held) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._held = held

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._held.add(text, last=stream_end)


def prompt_text(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model reads: the talk by its chat template, or without one the last message as it is."""
    if not tokenizer.chat_template:
        return messages[-1]["content"]
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def stop_mark(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text that ends an answer where the template has no end-of-text token there: "### Human:" and the like."""
    if not tokenizer.chat_template:
        return None
    talk = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "\0answer\0"},
        {"role": "user", "content": "\0next\0"},
    ]
    text = str(tokenizer.apply_chat_template(talk, tokenize=False))
    between = text.partition("\0answer\0")[2].partition("\0next\0")[0]
    if tokenizer.eos_token in between:
        return None
    return next((line.strip() for line in between.splitlines() if line.strip()), None)


@torch.no_grad()
def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    sampling: Sampling,
    emit: Callable[[str], None] | None = None,
) -> Answer:
    """The model's next turn; ``emit`` receives the text as it comes."""
    was_training = model.training
    model.eval()
    start = time.monotonic()
    inputs = tokenizer(prompt_text(messages, tokenizer), return_tensors="pt", add_special_tokens=False)
    stop = stop_mark(tokenizer)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pad_token_id=tokenizer.pad_token_id,
        streamer=_Streamer(tokenizer, Held(stop, emit)) if emit else None,
        synced_gpus=False,  # left out, a rank that answers alone waits for the others under ZeRO-3
        **({"stop_strings": [stop], "tokenizer": tokenizer} if stop else {}),
        **sampling.settings(),
    )
    model.train(was_training)
    new = output[0, inputs["input_ids"].shape[1] :]
    text = str(tokenizer.decode(new, skip_special_tokens=True))
    text = text.partition(stop)[0] if stop else text
    return Answer(text=text.strip(), tokens=len(new), seconds=time.monotonic() - start)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    emit: Callable[[str], None] | None = None,
) -> str:
    """The model's answer to one prompt that stands by itself; ``emit`` receives the text as it comes."""
    return reply(model, tokenizer, [{"role": "user", "content": prompt}], sampling, emit).text
