"""Records -> packed store: text of each record, tokens, split by key, rows, counts.

Runs once per host before any process group exists; ranks only map the result.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from transformers import PreTrainedTokenizerBase

from falcon_dist.config import DataConfig
from falcon_dist.contract import UserError
from falcon_dist.packaged import cache_folder
from falcon_dist.packing import Sample, Tally, held_out, pack
from falcon_dist.records import Record, Source, find_source
from falcon_dist.rows import MANIFEST, PackedStore, Parts, write_store

FORMAT: Final = 2
"""Rises when the same text would become other rows, or the store tells other facts."""
_BATCH: Final = 512
"""Records tokenised at once."""


def prepare_rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PackedStore:
    """The packed store of this data under this tokenizer, made now or found from an earlier run.

    Raises:
        UserError: the data is missing, empty or has a record that cannot be used.
    """
    check_data(config)
    source = find_source(config)
    recipe = _recipe(config, source, tokenizer)
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "rows" / digest[:32]
    if not (path / MANIFEST).is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_store(path, lambda parts: _fill(config, source, tokenizer, recipe, parts))
    return PackedStore.open(path)


def check_data(config: DataConfig) -> None:
    """Raises UserError for settings that no data can satisfy."""
    if config.max_length < 2:
        raise UserError(f'data.max_length must be at least 2: "{config.max_length}"')
    if not 0 <= config.eval_share < 1:
        raise UserError(f'data.eval_share must be from 0 to below 1: "{config.eval_share}"')


def _recipe(config: DataConfig, source: Source, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that decides the bytes of the store."""
    vocabulary = f"{tokenizer.backend_tokenizer.to_str()}\0{tokenizer.chat_template}\0{tokenizer.eos_token}"
    return {
        "format": FORMAT,
        "source": source.digest,
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "max_length": config.max_length,
        "packing": config.packing,
        "fields": [config.text_field, config.messages_field, config.key_field],
        "eval_share": config.eval_share,
        "max_records": config.max_records,
    }


def _fill(
    config: DataConfig, source: Source, tokenizer: PreTrainedTokenizerBase, recipe: Mapping[str, Any], parts: Parts
) -> dict[str, Any]:
    facts: dict[str, Any] = {"recipe": dict(recipe), "max_length": config.max_length, "source": source.name}
    for name, writer in parts.items():
        # The file is read once for each side: twice the reading, but no list of rows is ever held.
        tally = Tally()
        samples = _samples(source, config, tokenizer, held=name == "eval")
        pad = tokenizer.pad_token_id
        writer.write(pack(samples, length=config.max_length, join=config.packing, pad=pad, tally=tally))
        facts[name] = asdict(tally)
    return facts


def _samples(source: Source, config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, held: bool) -> Iterator[Sample]:
    numbered = enumerate(source.records(config))
    mine = ((n, r) for n, r in numbered if held_out(_key(r, n, config), config.eval_share) == held)
    for batch in _batches(mine):
        texts = [record_text(record, config, tokenizer) for _, record in batch]
        for (number, _), tokens in zip(batch, _tokenise(texts, tokenizer), strict=True):
            yield Sample(record=number, tokens=tokens, mask=np.ones(len(tokens), np.uint8))


def _batches(numbered: Iterable[tuple[int, Record]]) -> Iterator[list[tuple[int, Record]]]:
    numbered = iter(numbered)
    while batch := list(itertools.islice(numbered, _BATCH)):
        yield batch


def _key(record: Record, number: int, config: DataConfig) -> str:
    if config.key_field is None:
        return str(number)
    if config.key_field not in record.values:
        raise UserError(f'{record.place}: record has no key field: "{config.key_field}"; set data.key_field')
    return str(record.values[config.key_field])


def record_text(record: Record, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The record as the model will see it: its text, or its messages through the chat template.

    Raises:
        UserError: it has neither, the messages are not of that form, or there is no template.
    """
    text = record.values.get(config.text_field)
    if isinstance(text, str) and text:
        return text
    messages = record.values.get(config.messages_field)
    if isinstance(messages, list) and messages:
        return render_messages(messages, tokenizer, record.place)
    found = ", ".join(f'"{k}"' for k in record.values) or "nothing"
    raise UserError(
        f'{record.place}: record has neither text in "{config.text_field}" nor messages in '
        f'"{config.messages_field}": found {found}; set data.text_field or data.messages_field'
    )


def render_messages(messages: list[Any], tokenizer: PreTrainedTokenizerBase, place: str) -> str:
    """Messages -> text through the model's own template.

    Raises:
        UserError: a message lacks role or content, or the model brings no template.
    """
    for message in messages:
        fits = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not fits:
            raise UserError(f'{place}: a message needs "role" and "content" as text: {json.dumps(message)[:60]}')
    if not tokenizer.chat_template:
        raise UserError(f"{place}: the model has no chat template for messages; give records with text")
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray[Any, np.dtype[np.int32]]]:
    """Token ids of each text, an end-of-text token behind it where it has none yet."""
    end = tokenizer.eos_token_id
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        closed = text.rstrip().endswith(tokenizer.eos_token)
        yield np.asarray(ids if closed else [*ids, end], np.int32)


def describe(store: PackedStore) -> list[str]:
    """The counts of a store as lines for a person."""
    lines = []
    for name in ("train", "eval"):
        f = store.facts[name]
        cut = f", {f['cut_tokens']:,} tokens cut off" if f["cut_tokens"] else ""
        lines.append(
            f"{name}: {f['samples']:,} records, {f['tokens']:,} tokens -> {f['rows']:,} rows of "
            f"{store.facts['max_length']}, {f['padding_tokens']:,} padding tokens{cut}"
        )
    return lines
