"""Data sets -> packed store: passages, tokens, split by key, rows, counts; in one pass and bounded memory.

Runs once per host before any process group exists; ranks only map the result.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from falcon_dist.agreement import check_numbers
from falcon_dist.config import DataConfig
from falcon_dist.contract import UserError
from falcon_dist.encode import encode
from falcon_dist.forms import passage_of
from falcon_dist.packaged import cache_folder
from falcon_dist.packing import Forecast, Packer, Sample, held_out
from falcon_dist.readers import Item
from falcon_dist.records import BadRecord, Fault, Passage, Record, check_text
from falcon_dist.rows import MANIFEST, PackedStore, Parts, damaged_file, write_store, writing
from falcon_dist.sources import Source, find_eval_source, find_sources, mixed

FORMAT: Final = 4
"""Rises when the same text would become other rows, or the store tells other facts."""
SKIPPED_FILE: Final = "skipped.jsonl"
"""In the store: every record that was left out, with its place and the reason."""
_BATCH: Final = 512
"""Passages tokenised at once."""
_PLACES: Final = 5
"""Places of left-out records that are told for each reason; the file has all."""
_WHERE_FROM: Final = ("name", "mix", "eval_name", "split", "subset", "revision", "streaming", "on_bad")
"""Settings that only say where records come from: their content's hash stands for them."""

_SIDES: Final = {"train": "records to learn", "eval": "held-out records"}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """All that a store is made of."""

    config: DataConfig
    sources: list[Source]
    eval_source: Source | None
    tokenizer: PreTrainedTokenizerBase

    def recipe(self) -> dict[str, Any]:
        """All that decides the bytes of the store."""
        told = self.tokenizer.backend_tokenizer.to_str()
        vocabulary = f"{told}\0{self.tokenizer.chat_template}\0{self.tokenizer.eos_token}"
        return {
            "format": FORMAT,
            "sources": [[source.digest, source.weight] for source in self.sources],
            "eval_source": self.eval_source.digest if self.eval_source else None,
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
            **{key: value for key, value in asdict(self.config).items() if key not in _WHERE_FROM},
            "packing": self.config.packing_kind,
            "skip": self.config.on_bad == "skip",
        }


class Found(NamedTuple):
    """A record that is of use, on its side of the split."""

    number: int
    """Its number in the stream of all records."""
    place: str
    held: bool
    passage: Passage


def prepare_rows(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PackedStore:
    """The packed store of this data under this tokenizer, made now or found from an earlier run.

    Raises:
        UserError: the data is missing, empty or has a record that cannot be used, or the cache cannot be written.
    """
    material = gather(config, tokenizer)
    recipe = material.recipe()
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "rows" / digest[:32]
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        damage = _set_aside_damaged(path)
    if damage:
        print(f"packed rows: {damage}; packed anew", flush=True)
    if not (path / MANIFEST).is_file():
        write_store(path, lambda parts: _fill(material, recipe, parts))
    return PackedStore.open(path)


def _set_aside_damaged(path: Path) -> str | None:
    """What is damaged of a store of an earlier run, which is not used again."""
    if not path.exists() or (name := damaged_file(path)) is None:
        return None
    path.rename(path.with_name(f"{path.name}.refused-{os.getpid()}"))
    # Its host may have gone down before all was on disk.
    fault = "is torn or missing" if name == MANIFEST else "is not what was written (sha256 differs)"
    return f'"{path / name}" {fault}'


def gather(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Material:
    """Finds and hashes the data.

    Raises:
        UserError: a setting that no data can satisfy, or data that is not there.
    """
    check_numbers({"data": asdict(config)})
    if not (config.human_mark and config.answer_mark):
        raise UserError("data.human_mark and data.answer_mark must not be empty")
    return Material(
        config=config,
        sources=find_sources(config),
        eval_source=find_eval_source(config),
        tokenizer=tokenizer,
    )


class Skipped:
    """Records that cannot be used: the first one ends it all, or they are counted and written down."""

    def __init__(self, file: Path | None, *, stop: bool) -> None:
        self._file = file
        self._stop = stop
        self._counts: collections.Counter[str] = collections.Counter()
        self._places: dict[str, list[str]] = collections.defaultdict(list)

    def add(self, fault: Fault) -> None:
        """Raises UserError where data.on_bad says stop."""
        if self._stop:
            raise UserError(str(fault))
        self._counts[fault.reason] += 1
        if self._counts[fault.reason] <= _PLACES:
            self._places[fault.reason].append(fault.place)
        if self._file is not None:
            line = json.dumps(asdict(fault), ensure_ascii=False) + "\n"
            with (
                writing(self._file.parents[1]),
                self._file.open("a", encoding="utf-8", errors="backslashreplace") as file,
            ):
                file.write(line)

    def facts(self) -> dict[str, Any]:
        """{reason: how many, the first places}."""
        return {reason: {"count": n, "places": self._places[reason]} for reason, n in self._counts.most_common()}


def _fill(material: Material, recipe: Mapping[str, Any], parts: Parts) -> dict[str, Any]:
    config = material.config
    pad = material.tokenizer.pad_token_id
    packers = {name: Packer(config.packing_kind, length=config.max_length, pad=pad) for name in parts}
    forecast = Forecast(config.max_length)
    skipped = Skipped(parts["train"].folder.parent / SKIPPED_FILE, stop=config.on_bad == "stop")
    taken: collections.Counter[str] = collections.Counter()
    for held, sample in _samples(material, skipped, taken):
        name = "eval" if held else "train"
        parts[name].write(packers[name].add(sample))
        if not held:
            forecast.add(len(sample.tokens))
    for name, packer in packers.items():
        parts[name].write(packer.finish())
        if packer.tally.rows and not packer.tally.loss_tokens:
            raise UserError(
                f"data: no token of the {_SIDES[name]} carries loss; raise data.max_length or set data.loss=all"
            )
    return {
        "recipe": dict(recipe),
        "max_length": config.max_length,
        "taken": dict(taken),
        "skipped": skipped.facts(),
        "forecast": forecast.result(),
        **{name: asdict(packer.tally) for name, packer in packers.items()},
    }


def _samples(material: Material, skipped: Skipped, taken: collections.Counter[str]) -> Iterator[tuple[bool, Sample]]:
    for batch in batches(find_passages(material, skipped, taken), _BATCH):
        encoded = encode([found.passage for found in batch], material.tokenizer)
        for found, (tokens, mask) in zip(batch, encoded, strict=True):
            yield found.held, Sample(record=found.number, tokens=tokens, mask=mask)


def find_passages(material: Material, skipped: Skipped, taken: collections.Counter[str]) -> Iterator[Found]:
    """Every record of use in order; ``taken`` counts those of each source, ``skipped`` learns of the others."""
    config = material.config
    share = 0.0 if material.eval_source else config.eval_share
    for number, (name, key, item) in enumerate(_stream(material)):
        if isinstance(item, Fault):
            skipped.add(item)
            continue
        try:
            held = key is None or (bool(share) and held_out(_key(item, key, config), share))
            passage = passage_of(item.values, config, material.tokenizer)
            check_text(passage.text)
        except BadRecord as bad:
            skipped.add(Fault.of(item.place, bad))
            continue
        except UserError as error:
            raise UserError(f"{item.place}: {error}") from error
        taken[name] += 1
        yield Found(number, item.place, held, passage)


def _stream(material: Material) -> Iterator[tuple[str, str | None, Item]]:
    """(source, key of the split where the record has none of its own, record); no key: held out in any case."""
    single = len(material.sources) == 1
    stream = mixed(material.sources, material.config.mix_until)
    for source, number, item in itertools.islice(stream, material.config.max_records):
        yield material.sources[source].name, str(number) if single else f"{source}/{number}", item
    if material.eval_source:
        yield from ((material.eval_source.name, None, item) for item in material.eval_source.items())


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to ``size`` items."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _key(record: Record, number: str, config: DataConfig) -> str:
    if config.key_field is None:
        return number
    if config.key_field not in record.values:
        raise BadRecord("record has no key field", f'"{config.key_field}"', "set data.key_field")
    key = str(record.values[config.key_field])
    check_text(key)
    return key


def describe(store: PackedStore) -> list[str]:
    """The counts of a store as lines for a person."""
    lines = [_side_line(name, store.facts[name], store.facts["max_length"]) for name in ("train", "eval")]
    lines.append(_packing_line(store.facts["forecast"], store.facts["recipe"]["packing"]))
    if len(store.facts["taken"]) > 1:
        lines.append("mixed: " + ", ".join(f"{n:,} records of {name}" for name, n in store.facts["taken"].items()))
    skipped = store.facts["skipped"]
    lines += [_skipped_line(reason, told) for reason, told in skipped.items()]
    if skipped:
        lines.append(f"skipped records, all of them: {store.path / SKIPPED_FILE}")
    return lines


def _side_line(name: str, f: Mapping[str, int], length: int) -> str:
    share = f"{f['loss_tokens'] / max(1, f['tokens'] - f['cut_tokens']):.1%} with loss"
    cut = f", {f['cut_tokens']:,} tokens cut off" if f["cut_tokens"] else ""
    silent = f", {f['silent_rows']:,} rows without loss" if f["silent_rows"] else ""
    return (
        f"{name}: {f['samples']:,} records, {f['tokens']:,} tokens, {share} -> {f['rows']:,} rows of "
        f"{length}, {f['padding_tokens']:,} padding tokens{cut}{silent}"
    )


def _packing_line(forecast: Mapping[str, Mapping[str, int]], chosen: str) -> str:
    ways: dict[str, Callable[[Mapping[str, int]], str]] = {
        "wrapped": lambda f: f"{f['broken']:,} records broken over rows",
        "best-fit": lambda f: f"{f['cut']:,} tokens cut off",
        "off": lambda f: f"{f['cut']:,} tokens cut off",
    }
    texts = [
        f"{way}{' (chosen)' if way == chosen else ''} {forecast[way]['rows']:,} rows, "
        f"{forecast[way]['padding']:,} padding, {tell(forecast[way])}"
        for way, tell in ways.items()
    ]
    return "packing: " + "; ".join(texts)


def _skipped_line(reason: str, told: Mapping[str, Any]) -> str:
    more = f" and {told['count'] - len(told['places']):,} more" if told["count"] > len(told["places"]) else ""
    return f"skipped {told['count']:,} records: {reason} ({', '.join(told['places'])}{more})"
