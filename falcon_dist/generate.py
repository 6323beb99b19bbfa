"""A model's answer to a prompt, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 200
    top_k: int = 1
    """1 takes the likeliest token each time; above that, one of the k likeliest by chance."""


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands finished text on as it comes, the prompt left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        del stream_end
        self._emit(text)


def prompt_text(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model reads: the prompt as a user's turn where the model has a chat template, else as it is."""
    if not tokenizer.chat_template:
        return prompt
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    emit: Callable[[str], None] | None = None,
) -> tuple[str, int]:
    """The model's answer and how many tokens it took; ``emit`` receives the text as it comes."""
    was_training = model.training
    model.eval()
    inputs = tokenizer(prompt_text(prompt, tokenizer), return_tensors="pt", add_special_tokens=False)
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.top_k > 1,
        top_k=sampling.top_k if sampling.top_k > 1 else None,
        temperature=None,
        top_p=None,
        pad_token_id=tokenizer.pad_token_id,
        streamer=_Streamer(tokenizer, emit) if emit else None,
    )
    model.train(was_training)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip(), len(new)
