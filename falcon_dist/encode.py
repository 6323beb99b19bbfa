"""Passages -> token ids and which of them carry loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from falcon_dist.packing import Bytes, Ints
from falcon_dist.records import Passage


class Encoded(NamedTuple):
    """A passage in tokens, with the end-of-text token behind it."""

    tokens: Ints
    """[n]"""
    mask: Bytes
    """[n] 1 where the token carries loss."""


def encode(passages: Sequence[Passage], tokenizer: PreTrainedTokenizerBase) -> Iterator[Encoded]:
    """Each passage's tokens; an end-of-text token is added where the text has none yet.

    A token that holds any character of an answer carries loss, and so does the end behind a last answer.
    """
    offsets = any(passage.answers is not None for passage in passages)
    texts = [passage.text for passage in passages]
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=offsets)
    for number, passage in enumerate(passages):
        ids = found["input_ids"][number]
        places = found["offset_mapping"][number] if offsets else None
        yield _closed(passage, ids, _mask(passage, len(ids), places), tokenizer)


def _mask(passage: Passage, count: int, places: Any) -> npt.NDArray[np.bool_]:
    """[count] True where the token overlaps an answer; ``places`` are the tokens' character ranges."""
    if passage.answers is None:
        return np.ones(count, bool)
    starts, ends = np.asarray(places, np.int64).reshape(-1, 2).T
    carries = np.zeros(count, bool)
    for start, end in passage.answers:
        carries |= (ends > start) & (starts < end)
    return carries


def _closed(
    passage: Passage, ids: list[int], mask: npt.NDArray[np.bool_], tokenizer: PreTrainedTokenizerBase
) -> Encoded:
    text = passage.text.rstrip()
    if text.endswith(tokenizer.eos_token):
        return Encoded(np.asarray(ids, np.int32), mask.astype(np.uint8))
    answered = passage.answers is None or (bool(passage.answers) and passage.answers[-1][1] >= len(text))
    return Encoded(np.asarray([*ids, tokenizer.eos_token_id], np.int32), np.append(mask, answered).astype(np.uint8))
