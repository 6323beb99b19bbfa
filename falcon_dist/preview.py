"""``falcon preview``: what a model will really be trained on, row by row."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from falcon_dist.chat_template import set_template
from falcon_dist.config import TrainConfig
from falcon_dist.dataset import Skipped, describe, find_passages, gather, prepare_rows
from falcon_dist.engine.native import load_config, load_tokenizer
from falcon_dist.masking import check_packing
from falcon_dist.packing import NO_RECORD
from falcon_dist.prepare import find_model
from falcon_dist.rows import IGNORED, PackedStore, Part
from falcon_dist.settings import load

LEARNED: Final = "\033[32m"
READ_ONLY: Final = "\033[2m"
BORDER: Final = "\033[1;35m"
PLAIN: Final = "\033[0m"
_BAR: Final = 40
_SHOWN: Final = 3
"""Duplicates that are shown with their places."""

Paint = Callable[[str, str], str]


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The verb's own flags."""
    parser = argparse.ArgumentParser(prog="falcon preview", description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("data", nargs="?", help="a file, folder or hub name (default: that of --config, else the demo's text)")
    flag("--config", metavar="RUN|RECIPE", help="a run folder, a recipe's name or its file")
    flag("--model", metavar="NAME", help="whose tokenizer and chat template to use")
    flag("--set", action="append", default=[], metavar="KEY=VALUE", help="one setting, as --set data.loss=answers")
    flag("--rows", type=int, default=3, metavar="N", help="rows to show (3)")
    flag("--eval", action="store_true", help="show held-out rows instead of training rows")
    flag("--color", choices=("auto", "always", "never"), default="auto")
    return parser.parse_args(argv)


def preview(argv: Sequence[str]) -> int:
    """Packs the data as a run would and shows it.

    Raises:
        UserError: the data or the model cannot be used.
    """
    args = parse_args(argv)
    named = {"data.name": args.data, "model.name": args.model}
    config = load(args.config, [*(f"{key}={value}" for key, value in named.items() if value), *args.set])
    place = find_model(config.model)
    check_packing(load_config(place, config.model), config.data.packing_kind != "off")
    tokenizer = load_tokenizer(place, config.model)
    set_template(tokenizer, config.data.template)
    store = prepare_rows(config.data, tokenizer)
    part = store.evaluation if args.eval else store.train
    sections = [
        row_lines(part, range(min(args.rows, len(part))), tokenizer, _painter(_in_color(args.color))),
        describe(store),
        length_lines(record_lengths(store)),
        duplicate_lines(config, tokenizer),
    ]
    print("\n\n".join("\n".join(lines) for lines in sections))
    return 0


def _in_color(choice: str) -> bool:
    if choice == "auto":
        return sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return choice == "always"


def _painter(colors: bool) -> Paint:
    def paint(style: str, text: str) -> str:
        return f"{style}{text}{PLAIN}" if colors else text

    return paint


def row_lines(part: Part, rows: Sequence[int], tokenizer: PreTrainedTokenizerBase, paint: Paint) -> list[str]:
    """Rows decoded: learned text green, or in [brackets] as well; each record under its number."""
    lines = [f"{paint(LEARNED, '[learned]')} {paint(READ_ONLY, 'read only')}"]
    for row in rows:
        batch = part.batch([row])
        tokens, labels, records = (batch[key][0].tolist() for key in ("input_ids", "labels", "records"))
        learned = [label != IGNORED for label in labels]
        padding = records.count(NO_RECORD)
        counts = f"{len(tokens) - padding} tokens, {sum(learned)} with loss, {padding} padding"
        lines.append(paint(BORDER, f"== row {row}: {counts}, {len(set(records) - {NO_RECORD})} records"))
        for record, places in itertools.groupby(range(len(tokens)), key=records.__getitem__):
            if record != NO_RECORD:
                text = _painted(list(places), tokens, learned, tokenizer, paint)
                lines.append(f"{paint(BORDER, f'-- record {record}:')} {text}")
    return lines


def _painted(
    places: list[int], tokens: list[int], learned: list[bool], tokenizer: PreTrainedTokenizerBase, paint: Paint
) -> str:
    text = ""
    for carries, run in itertools.groupby(places, key=learned.__getitem__):
        piece = tokenizer.decode([tokens[place] for place in run])
        text += paint(LEARNED, f"[{piece}]") if carries else paint(READ_ONLY, piece)
    return text


def record_lengths(store: PackedStore) -> npt.NDArray[np.int64]:
    """Tokens of each record that is in the rows, as far as it is."""
    counts = np.zeros(0, np.int64)
    for part in (store.train, store.evaluation):
        for first in range(0, len(part), 4096):
            records = np.asarray(part.records[first : first + 4096])
            found = np.bincount(records[records != NO_RECORD])
            if len(found) > len(counts):
                counts = np.pad(counts, (0, len(found) - len(counts)))
            counts[: len(found)] += found
    return counts[counts > 0]


def length_lines(lengths: npt.NDArray[np.int64]) -> list[str]:
    """A histogram over powers of two."""
    if not len(lengths):
        return ["record lengths: none"]
    p10, p50, p90 = np.percentile(lengths, [10, 50, 90]).astype(int)
    lines = [f"record lengths in tokens: 10 % {p10:,}, half {p50:,}, 90 % {p90:,}, longest {lengths.max():,}"]
    counts = np.bincount(np.log2(lengths).astype(int))
    for power in range(int(counts.nonzero()[0][0]), len(counts)):
        bar = "#" * round(_BAR * counts[power] / counts.max())
        lines.append(f"{1 << power:>9,} - {(2 << power) - 1:>9,}  {counts[power]:>9,}  {bar}".rstrip())
    return lines


def duplicate_lines(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Records whose whole text comes again, found by a 64-bit hash of it."""
    seen: dict[bytes, str] = {}
    twins: list[tuple[str, str]] = []
    for digest, place in _texts(config, tokenizer):
        if digest in seen:
            twins.append((place, seen[digest]))
        else:
            seen[digest] = place
    lines = [f"duplicates: {len(twins):,} of {len(seen) + len(twins):,} records"]
    first = collections.Counter(place for _, place in twins).most_common(_SHOWN)
    return [*lines, *(f"  {place} comes {count + 1} times" for place, count in first)]


def _texts(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bytes, str]]:
    material = gather(dataclasses.replace(config.data, mix_until="first"), tokenizer)
    skipped = Skipped(None, stop=False)
    for found in find_passages(material, skipped, collections.Counter()):
        yield hashlib.blake2b(found.passage.text.encode(), digest_size=8).digest(), found.place
