"""From a file to rows: text, split, counts, reuse, and every way a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import TEXT, make_tokenizer

from falcon_dist.config import DataConfig
from falcon_dist.contract import UserError
from falcon_dist.dataset import describe, prepare_rows
from falcon_dist.rows import PackedStore


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def talk(number: int) -> dict[str, object]:
    messages = [{"role": "user", "content": f"Question {number}?"}, {"role": "assistant", "content": TEXT[number % 3]}]
    return {"id": f"talk-{number // 2}", "messages": messages}


def test_text_becomes_rows_that_decode_back(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    file = write(tmp_path / "texts.jsonl", [{"text": t} for t in TEXT])
    store = prepare_rows(DataConfig(name=str(file), max_length=16), tokenizer)
    flat = store.train.tokens[store.train.records >= 0]
    assert tokenizer.decode(flat) == "".join(t + "<|end|>" for t in TEXT)
    assert store.facts["train"]["samples"] == 3
    assert "train: 3 records" in describe(store)[0]


def test_messages_go_through_the_template_without_a_second_end(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    file = write(tmp_path / "talks.jsonl", [talk(0)])
    store = prepare_rows(DataConfig(name=str(file), max_length=256), tokenizer)
    flat = store.train.tokens[store.train.records >= 0]
    assert tokenizer.decode(flat) == f"<|user|>Question 0?<|end|><|assistant|>{TEXT[0]}<|end|>"


def test_split_keeps_a_key_on_one_side(tmp_path: Path) -> None:
    file = write(tmp_path / "talks.jsonl", [talk(n) for n in range(200)])
    config = DataConfig(name=str(file), max_length=64, key_field="id", eval_share=0.3)
    store = prepare_rows(config, make_tokenizer())
    sides = [set(np.unique(part.records)) - {-1} for part in (store.train, store.evaluation)]
    assert not sides[0] & sides[1]
    assert len(sides[0]) + len(sides[1]) == 200
    keys = [{record // 2 for record in side} for side in sides]
    assert not keys[0] & keys[1]
    assert 20 < len(sides[1]) < 100


def test_labels_never_cross_a_border_and_padding_rows_are_empty(tmp_path: Path) -> None:
    file = write(tmp_path / "texts.jsonl", [{"text": t} for t in TEXT])
    store = prepare_rows(DataConfig(name=str(file), max_length=48), make_tokenizer())
    batch = store.train.batch([0, 1, -1])
    records, labels = batch["records"], batch["labels"]
    starts = records[:2, 1:] != records[:2, :-1]
    assert starts.any()
    assert (labels[:2, 1:][starts] == -100).all()
    assert (labels[2] == -100).all()
    assert (labels[0, 1:][~starts[0]] == batch["input_ids"][0, 1:][~starts[0]]).all()
    assert store.train.count_tokens([0, -1]) == 48


def test_second_start_reuses_the_store_and_other_settings_do_not(tmp_path: Path, cache: Path) -> None:
    file = write(tmp_path / "texts.jsonl", [{"text": t} for t in TEXT])
    first = prepare_rows(DataConfig(name=str(file), max_length=16), make_tokenizer())
    stamp = (first.path / "manifest.json").stat().st_mtime_ns
    again = prepare_rows(DataConfig(name=str(file), max_length=16), make_tokenizer())
    assert (again.path, again.digest) == (first.path, first.digest)
    assert (again.path / "manifest.json").stat().st_mtime_ns == stamp
    other = prepare_rows(DataConfig(name=str(file), max_length=17), make_tokenizer())
    assert other.path != first.path
    assert not list(cache.rglob("*.partial*"))


def test_damaged_store_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "texts.jsonl", [{"text": t} for t in TEXT])
    store = prepare_rows(DataConfig(name=str(file), max_length=16), make_tokenizer())
    with (store.path / "train" / "tokens.bin").open("r+b") as damaged:
        damaged.truncate(10)
    with pytest.raises(UserError, match=r"tokens.bin\" is damaged"):
        PackedStore.open(store.path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], 'data.name: no record in "'),
        (['{"text": "a"}', "{oops"], 'd.jsonl:2: not a JSON object: "{oops"'),
        (['{"text": "a"}', "[1]"], 'd.jsonl:2: not a JSON object: "[1]"'),
        (
            ['{"prompt": "a"}'],
            'd.jsonl:1: record has neither text in "text" nor messages in "messages": found "prompt"',
        ),
        (['{"text": ""}'], "d.jsonl:1: record has neither text"),
        (['{"messages": [{"role": "user"}]}'], 'd.jsonl:1: a message needs "role" and "content"'),
    ],
)
def test_bad_files_name_line_and_fault(tmp_path: Path, lines: list[str], message: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(UserError) as error:
        prepare_rows(DataConfig(name=str(file)), make_tokenizer())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(name="nowhere.jsonl"), 'data.name: no such file: "nowhere.jsonl"'),
        (DataConfig(name="pypi:nothing"), 'data.name: no such package is known: "pypi:nothing"'),
        (DataConfig(max_length=1), 'data.max_length must be at least 2: "1"'),
        (DataConfig(eval_share=1.0), 'data.eval_share must be from 0 to below 1: "1.0"'),
    ],
)
def test_settings_that_no_data_fits(config: DataConfig, message: str) -> None:
    with pytest.raises(UserError) as error:
        prepare_rows(config, make_tokenizer())
    assert message in str(error.value)


def test_missing_key_field_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r'd.jsonl:1: record has no key field: "conv"'):
        prepare_rows(DataConfig(name=str(file), key_field="conv", eval_share=0.5), make_tokenizer())
