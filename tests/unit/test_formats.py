"""From a file to tokens and labels, for each file format and each form of record."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny_models import make_tokenizer

from falcon_dist import sources
from falcon_dist.chat_template import find_template, known_templates, render
from falcon_dist.config import ColumnsConfig, DataConfig
from falcon_dist.contract import UserError
from falcon_dist.dataset import prepare_rows
from falcon_dist.records import BadRecord

IGNORED = -100
Turns = list[dict[str, str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shown(config: DataConfig, template: str | None = "own") -> str:
    """What the model reads, record by record; what it is asked to predict stands in [brackets]."""
    tokenizer = make_tokenizer()
    if template != "own":
        tokenizer.chat_template = template and find_template(template)
    store = prepare_rows(config, tokenizer)
    batch = store.train.batch(list(range(len(store.train))))
    tokens, labels, records = (batch[k].flatten().tolist() for k in ("input_ids", "labels", "records"))
    assert all(label in (IGNORED, token) for token, label in zip(tokens, labels, strict=True))
    lines: dict[int, str] = {}
    for record, places in itertools.groupby(range(len(tokens)), key=lambda i: records[i]):
        if record >= 0:
            runs = itertools.groupby(places, key=lambda i: labels[i] != IGNORED)
            texts = [(tokenizer.decode([tokens[i] for i in run]), learned) for learned, run in runs]
            lines[record] = "".join(f"[{text}]" if learned else text for text, learned in texts)
    return "\n".join(lines[record] for record in sorted(lines))


def config(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(name=str(path), **{"max_length": 512, "packing": "best-fit", **changes})


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


ROWS = [{"id": "a", "text": "One, two"}, {"id": "b", "text": 'A "quoted"\nline'}]
READ = 'O[ne, two<|end|>]\nA[ "quoted"\nline<|end|>]'


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def parquet_bytes() -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), out, row_group_size=1)
    return out.getvalue()


WRITERS: dict[str, Callable[[Path], object]] = {
    "d.jsonl": lambda p: jsonl(p, *ROWS),
    "d.jsonl.gz": lambda p: p.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode())),
    "d.json": lambda p: p.write_text(json.dumps({"version": 1, "data": ROWS})),
    "d.parquet": lambda p: parquet.write_table(pa.Table.from_pylist(ROWS), p, row_group_size=1),
    "d.parquet.gz": lambda p: p.write_bytes(gzip.compress(parquet_bytes())),
    "d.csv": write_csv,
    "d.tsv": lambda p: write_csv(p, "\t"),
    "saved": lambda p: datasets.Dataset.from_list(ROWS).save_to_disk(p),
    "dict": lambda p: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(p),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_format_gives_the_same_tokens_and_labels(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert shown(config(tmp_path / name)) == READ


def test_folder_and_pattern_read_all_their_files_in_order(tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        jsonl(tmp_path / f"part-{number}.jsonl", row)
    (tmp_path / "README.md").write_text("not data")
    assert shown(config(tmp_path)) == READ
    assert shown(config(tmp_path / "part-*.jsonl")) == READ


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("line", "O[ne<|end|>]\ntwo[<|end|>]\nTh[ree<|end|>]"),
        ("paragraph", "O[ne\ntwo<|end|>]\nTh[ree<|end|>]"),
        ("document", "O[ne\ntwo\n\nThree<|end|>]"),
    ],
)
def test_text_files_by_line_paragraph_or_whole(tmp_path: Path, by: str, expected: str) -> None:
    (tmp_path / "d.txt").write_text("One\ntwo\n\nThree\n")
    assert shown(config(tmp_path / "d.txt", text_by=by)) == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_names_and_streaming_go_through_datasets(tmp_path: Path, monkeypatch, streaming: bool) -> None:
    """A repository as the hub holds it, in a folder: ``datasets`` itself resolves, caches and streams it."""
    repository = tmp_path / "people" / "talks"
    (repository / "data").mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(ROWS[:1]), repository / "data" / "train-00000-of-00002.parquet")
    parquet.write_table(pa.Table.from_pylist(ROWS[1:]), repository / "data" / "train-00001-of-00002.parquet")
    parquet.write_table(pa.Table.from_pylist(ROWS), repository / "data" / "test-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    asked = config(Path("people/talks"), streaming=streaming)
    monkeypatch.setattr(sources, "_find", sources._hub_source)  # which would take the folder for one of files
    assert shown(asked) == READ
    assert any(tmp_path.joinpath("datasets").rglob("*.arrow")) != streaming
    with pytest.raises(UserError, match=r'cannot load "people/talks" \(split "validation"\): '):
        shown(replace(asked, split="validation"))


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}
GUANACO = "### Human: Hi### Assistant: Yes?### Human: Bye### Assistant: So long."

FORMS: dict[str, tuple[dict[str, Any], str | None, str, str]] = {
    # record, template, what is learned with loss=all, with loss=answers
    "marked text": (
        {"text": GUANACO},
        None,
        "###[ Human: Hi### Assistant: Yes?### Human: Bye### Assistant: So long.<|end|>]",
        "### Human: Hi### Assistant:[ Yes?###] Human: Bye### Assistant:[ So long.<|end|>]",
    ),
    "prompt and completion": (
        {"prompt": "2 + 2 =", "completion": " 4"},
        None,
        "2[ + 2 = 4<|end|>]",
        "2 + 2 =[ 4<|end|>]",
    ),
    "prompt and completion as messages": (
        {"prompt": MESSAGES[1:2], "completion": MESSAGES[2:3]},
        "own",
        "<|user|>[Hi<|end|><|assistant|>Yes?<|end|>]",
        "<|user|>Hi<|end|><|assistant|>[Yes?<|end|>]",
    ),
    "messages, the model's template": (
        {"messages": MESSAGES},
        "own",
        "<[|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Yes?<|end|>"
        "<|user|>Bye<|end|><|assistant|>So long.<|end|>]",
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>[Yes?<|end|>]"
        "<|user|>Bye<|end|><|assistant|>[So long.<|end|>]",
    ),
    "messages, falcon": (
        {"messages": MESSAGES},
        "falcon",
        "B[e brief.\n\nUser: Hi\n\nAssistant: Yes?<|end|>\nUser: Bye\n\nAssistant: So long.<|end|>\n]",
        "Be brief.\n\nUser: Hi\n\nAssistant:[ Yes?<|end|>]\nUser: Bye\n\nAssistant:[ So long.<|end|>]\n",
    ),
    "messages, guanaco": (
        {"messages": MESSAGES[1:]},
        "guanaco",
        "###[ Human: Hi### Assistant: Yes?### Human: Bye### Assistant: So long.<|end|>]",
        "### Human: Hi### Assistant:[ Yes?###] Human: Bye### Assistant:[ So long.<|end|>]",
    ),
    "messages, chatml": (
        {"messages": MESSAGES[1:3]},
        "chatml",
        "<[|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|end|>]",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Yes?<|im_end|>]\n[<|end|>]",
    ),
    "sharegpt": (
        {"system": "Be brief.", **SHAREGPT},
        "own",
        "<[|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Yes?<|end|>]",
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>[Yes?<|end|>]",
    ),
    "alpaca, by the template": (
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        "own",
        "<|user|>[Add.\n\n2 and 2<|end|><|assistant|>4<|end|>]",
        "<|user|>Add.\n\n2 and 2<|end|><|assistant|>[4<|end|>]",
    ),
    "alpaca, no template": (
        {"instruction": "Add.", "input": "", "output": "4"},
        None,
        "B[elow is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n4<|end|>]",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n[4<|end|>]",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_with_loss_on_all_and_on_answers_alone(tmp_path: Path, form: str) -> None:
    record, template, everything, answers = FORMS[form]
    file = jsonl(tmp_path / "d.jsonl", record)
    assert shown(config(file), template) == everything
    assert shown(config(file, loss="answers"), template) == answers


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "d.jsonl", {"question": "2 + 2 =", "reply": " 4", "text": "not this"})
    columns = ColumnsConfig(prompt="question", completion="reply")
    assert shown(config(file, columns=columns, loss="answers")) == "2 + 2 =[ 4<|end|>]"
    assert shown(config(file, columns=columns, form="text")) == "n[ot this<|end|>]"
    talk = [{"who": "user", "says": "Hi"}, {"who": "assistant", "says": "Yes?"}]
    file = jsonl(tmp_path / "t.jsonl", {"talk": talk})
    named = config(file, messages_field="talk", columns=ColumnsConfig(role="who", content="says"), loss="answers")
    assert shown(named) == "<|user|>Hi<|end|><|assistant|>[Yes?<|end|>]"


@pytest.mark.parametrize(
    "record", [{"prompt": "2 + 2 =", "completion": " 4"}, {"instruction": "Add.", "input": "2 and 2", "output": "4"}]
)
def test_a_system_text_without_a_turn_is_not_dropped_in_silence(tmp_path: Path, record: dict[str, str]) -> None:
    file = jsonl(tmp_path / "d.jsonl", {**record, "persona": "Be brief."})
    columns = ColumnsConfig(system="persona")
    with pytest.raises(UserError, match=r'd.jsonl:1: a system text has no turn .*: found "Be brief."; make it mess'):
        shown(config(file, columns=columns), None)
    assert "4" in shown(config(file), None)
    assert "Be brief." not in shown(config(file, columns=ColumnsConfig(system="")), None)


@pytest.mark.parametrize("name", ["falcon", "guanaco", "chatml"])
def test_templates_mark_the_same_answers_as_their_prefixes_do(name: str) -> None:
    """Two independent ways to find the answers agree, so that training and chat see the same text."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = find_template(name)
    marked = render(MESSAGES, tokenizer, answers=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("generation -%}", "if true -%}").replace(
        "endif true", "endif"
    )
    assert "{%- generation" not in tokenizer.chat_template
    unmarked = render(MESSAGES, tokenizer, answers=True)
    assert marked == unmarked
    assert name in known_templates()


def test_template_that_rewrites_earlier_turns_is_refused_for_answers_only() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"no {% generation %} marks"):
        render(MESSAGES, tokenizer, answers=True)
    assert render(MESSAGES, tokenizer, answers=False).text.startswith("5Be brief.")


@pytest.mark.parametrize("said", ["Yes?", "  Yes? \n", "a", "end", "<"])
def test_a_talk_may_begin_with_an_answer_however_short_or_trimmed(said: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'].strip()")
    turns = [{"role": "assistant", "content": said}, {"role": "user", "content": said}]
    text, answers = render([*turns, *turns[:1]], tokenizer, answers=True)
    assert [text[start:end] for start, end in answers or ()] == [f"{said.strip()}<|end|>"] * 2
    assert text.startswith("<|assistant|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | replace('\\0', '') }}{% endfor %}"
    with pytest.raises(UserError, match=r"no {% generation %} marks"):
        render(turns, tokenizer, answers=True)


def test_template_that_refuses_a_talk_makes_the_record_bad() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = find_template("falcon")
    with pytest.raises(BadRecord) as bad:
        render([{"role": "tool", "content": "42"}], tokenizer, answers=False)
    assert bad.value.detail == "no such role: tool"


def test_templates_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'no such file: "nothing.jinja"'):
        find_template("nothing.jinja")
    with pytest.raises(UserError, match=r'no such template or model: "./nothing"; known: chatml, falcon, guanaco'):
        find_template("./nothing")
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}\n")
    assert find_template(str(tmp_path / "mine.jinja")) == "{{ messages[0]['content'] }}"
