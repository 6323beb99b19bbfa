"""From a file to rows: text, split, counts, reuse, and every way a file can be wrong."""

from __future__ import annotations

import errno
import json
import shutil
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pytest
from safetensors import SafetensorError
from tiny_models import TEXT, make_tokenizer, write_model

from falcon_dist import packaged
from falcon_dist.__main__ import main
from falcon_dist.config import DataConfig, MixUntil
from falcon_dist.contract import UserError
from falcon_dist.dataset import describe, prepare_rows
from falcon_dist.readers import read_file
from falcon_dist.records import Record
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


def test_a_store_whose_bytes_have_changed_is_packed_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DataConfig(name=str(write(tmp_path / "texts.jsonl", [{"text": t} for t in TEXT])), max_length=16)
    store = prepare_rows(config, make_tokenizer())
    whole = store.train.tokens.copy()
    file = store.path / "train/tokens.bin"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    again = prepare_rows(config, make_tokenizer())
    assert (again.train.tokens == whole).all()
    assert f'"{file}" is not what was written (sha256 differs); packed anew' in capsys.readouterr().out


@pytest.mark.parametrize("torn", [b"", b'{"facts": {', None])
def test_a_store_whose_manifest_is_torn_is_packed_anew(tmp_path: Path, capsys, torn: bytes | None) -> None:
    """So a host leaves it that goes down soon after it has packed the rows."""
    config = DataConfig(name=str(write(tmp_path / "texts.jsonl", [{"text": t} for t in TEXT])), max_length=16)
    store = prepare_rows(config, make_tokenizer())
    whole, file = store.train.tokens.copy(), store.path / "manifest.json"
    file.unlink() if torn is None else file.write_bytes(torn)
    again = prepare_rows(config, make_tokenizer())
    assert (again.train.tokens == whole).all()
    assert capsys.readouterr().out == f'packed rows: "{file}" is torn or missing; packed anew\n'


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, cache: Path) -> None:
    config = DataConfig(name=str(write(tmp_path / "texts.jsonl", [{"text": t} for t in TEXT])), max_length=16)
    cache.write_text("in the way")
    with pytest.raises(UserError, match=rf'cannot write in "{cache}/falcon-dist/rows": Not a directory; .*XDG_CACHE_'):
        prepare_rows(config, make_tokenizer())


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


def test_rows_are_told_by_their_bytes_not_by_what_the_data_was_called_when_they_were_packed(
    tmp_path: Path, cache: Path
) -> None:
    """Between a checkpoint and its resume the cache may be emptied and the data moved; every host has its own."""
    texts = [{"text": t} for t in TEXT]
    first = prepare_rows(DataConfig(name=str(write(tmp_path / "a.jsonl", texts)), max_length=16), make_tokenizer())
    shutil.rmtree(first.path)
    moved = prepare_rows(DataConfig(name=str(write(tmp_path / "b.jsonl", texts)), max_length=16), make_tokenizer())
    assert moved.path == first.path
    assert moved.of_manifest != first.of_manifest
    assert moved.digest == first.digest
    texts[0]["text"] += "!"
    other = prepare_rows(DataConfig(name=str(write(tmp_path / "a.jsonl", texts)), max_length=16), make_tokenizer())
    assert other.digest != first.digest


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
        (DataConfig(mix=("nowhere.jsonl=1",)), 'data.mix: no such file: "nowhere.jsonl"'),
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


def test_records_that_cannot_be_used_are_counted_with_reason_and_line(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "good"}\n{oops\n{"prompt": "a"}\n\n[1]\n{"text": "fine"}\n')
    with pytest.raises(UserError, match=r"d.jsonl:2: not a JSON object"):
        prepare_rows(DataConfig(name=str(file)), make_tokenizer())
    store = prepare_rows(DataConfig(name=str(file), on_bad="skip"), make_tokenizer())
    assert store.facts["train"]["samples"] == 2
    told = "\n".join(describe(store))
    assert f"skipped 2 records: not a JSON object ({file}:2, {file}:5)" in told
    assert f'skipped 1 records: record has neither text in "text" nor messages in "messages" ({file}:3)' in told
    written = [json.loads(line) for line in (store.path / "skipped.jsonl").read_text().splitlines()]
    assert [fault["place"] for fault in written] == [f"{file}:2", f"{file}:3", f"{file}:5"]


def test_half_a_surrogate_pair_makes_a_record_bad(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"id": 1, "text": "good"}\n{"id": 2, "text": "a\\ud800b"}\n{"id": "\\udfff", "text": "fine"}\n')
    with pytest.raises(UserError, match=r'd.jsonl:2: half of a surrogate pair is no text: "\\ud800"; write whole '):
        prepare_rows(DataConfig(name=str(file)), make_tokenizer())
    with file.open("a") as more:
        more.write('{"id": 4, "\\udbff": 3}\n')
    config = DataConfig(name=str(file), on_bad="skip", key_field="id", eval_share=0.001)
    store = prepare_rows(config, make_tokenizer())
    assert store.facts["train"]["samples"] + store.facts["eval"]["samples"] == 1
    assert f"skipped 2 records: half of a surrogate pair is no text ({file}:2, {file}:3)" in "\n".join(describe(store))
    last = json.loads((store.path / "skipped.jsonl").read_text().splitlines()[2])
    assert last["place"] == f"{file}:4"


def test_only_the_first_places_are_printed_and_all_are_written(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "good"}\n' + "no\n" * 30)
    store = prepare_rows(DataConfig(name=str(file), on_bad="skip"), make_tokenizer())
    assert f"{file}:6 and 25 more)" in describe(store)[3]
    assert len((store.path / "skipped.jsonl").read_text().splitlines()) == 30


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.csv", "a,text\n1,x\n2\n", "d.csv:3: row has fewer fields than the header"),
        ("d.csv", "a,text\n1,x,y\n", 'd.csv:2: row has more fields than the header: "y"'),
        ("d.csv", 'a,text\n1,"x\ny"\n2\n', "d.csv:4: row has fewer fields than the header"),
        ("d.csv", 'a,text\n1,"x"y\n', "d.csv:2: not a CSV row"),
        ("d.json", '[{"text": "a"}, 3]', 'd.json[1]: not a JSON object: "3"'),
        ("d.json", '{"text": "a"}\n{"text": "b"}', "d.json[0]: not JSON: parse error: trailing garbage; "),
        ("d.json", '[{"text": "a"}, {"text": NaN}]', "d.json[1]: not JSON: lexical error: invalid char in json text; "),
        ("d.json", '[{"text": "a"}, {"te', "d.json[1]: not JSON: parse error: premature EOF; "),
        ("d.json", '{"a": [], "b": []}', "d.json: a .json file must hold one list of objects"),
        ("d.json", '[{"text": "\x00"}]', "d.json[0]: not JSON: "),
        ("d.json", '{"a": 1}', "d.json: a .json file must hold one list of objects"),
        ("d.parquet", "no parquet at all", "d.parquet: not a parquet file"),
        ("d.jsonl.gz", "no gzip", "d.jsonl.gz: not a whole gzip file"),
        ("d.docx", "", "no file to read"),
        ("d.jsonl", '{"conversations": [{"from": "gpt"}]}', 'd.jsonl:1: a message needs "role" and "content"'),
        ("d.jsonl", '{"prompt": "a", "completion": ""}', 'd.jsonl:1: "completion" is empty'),
    ],
)
def test_every_format_names_what_is_wrong_and_where(tmp_path: Path, name: str, content: str, message: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(UserError) as error:
        prepare_rows(DataConfig(name=str(file)), make_tokenizer())
    assert message in str(error.value)


def test_json_lists_are_read_in_pieces(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    with file.open("w") as out:
        out.write('{"version": 1, "data": [{"text": "first"}')
        for _ in range(40):
            out.write(', {"text": "' + "x" * 250_000 + '"}')
        out.write("]}")
    tracemalloc.start()
    assert sum(isinstance(item, Record) for item in read_file(file, "line")) == 41
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000 < file.stat().st_size


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    file = tmp_path / "d.txt"
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=r"d.txt: not UTF-8 text: .*0xe9"):
        prepare_rows(DataConfig(name=str(file)), make_tokenizer())
    file = tmp_path / "d.json"
    file.write_bytes(b'[{"text": "a"}, {"text": "caf\xe9"}]')
    with pytest.raises(UserError, match=r"d.json\[1\]: not JSON: lexical error: invalid bytes in UTF8 string; "):
        prepare_rows(DataConfig(name=str(file)), make_tokenizer())


def test_answers_alone_need_an_answer(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", [{"text": TEXT[0]}, {"text": "No marks here."}])
    with pytest.raises(UserError, match=r'd.jsonl:2: no answer to learn from: no text behind "### Assistant:"'):
        prepare_rows(DataConfig(name=str(file), loss="answers"), make_tokenizer())
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r'talks.jsonl:1: the model has no chat template .* data.template="falcon"'):
        prepare_rows(DataConfig(name=str(write(tmp_path / "talks.jsonl", [talk(0)]))), tokenizer)


def mix(tmp_path: Path, until: MixUntil, weights: tuple[int, int]) -> dict[str, int]:
    files = [
        write(tmp_path / f"{n}.jsonl", [{"text": f"{n}{i}"} for i in range(size)]) for n, size in (("a", 30), ("b", 5))
    ]
    names = tuple(f"{file}={weight}" for file, weight in zip(files, weights, strict=True))
    store = prepare_rows(DataConfig(mix=names, mix_until=until, max_length=8), make_tokenizer())
    return {Path(name).stem: count for name, count in store.facts["taken"].items()}


def test_data_sets_are_mixed_by_weight(tmp_path: Path) -> None:
    assert mix(tmp_path, "first", (3, 1)) == {"a": 18, "b": 5}
    assert mix(tmp_path, "first", (10, 1)) == {"a": 30, "b": 3}
    assert mix(tmp_path, "all", (1, 1)) == {"a": 30, "b": 30}


def test_repeated_records_of_a_mix_stay_on_their_side_of_the_split(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{n}.jsonl", [{"text": f"{n}{i}."} for i in range(size)]) for n, size in (("a", 60), ("b", 7))
    ]
    config = DataConfig(
        mix=tuple(f"{f}=1" for f in files), mix_until="all", eval_share=0.5, packing="off", max_length=8
    )
    tokenizer = make_tokenizer()
    store = prepare_rows(config, tokenizer)
    sides = [
        {tokenizer.decode(row[ids >= 0]) for row, ids in zip(part.tokens, part.records, strict=True)}
        for part in (store.train, store.evaluation)
    ]
    assert len(sides[0] | sides[1]) == 67
    assert not sides[0] & sides[1]


def test_evaluation_can_have_its_own_data_set(tmp_path: Path) -> None:
    train, other = (write(tmp_path / f"{n}.jsonl", [{"text": n}] * size) for n, size in (("train", 4), ("other", 2)))
    store = prepare_rows(
        DataConfig(name=str(train), eval_name=str(other), packing="off", max_length=8), make_tokenizer()
    )
    assert (store.facts["train"]["samples"], store.facts["eval"]["samples"]) == (4, 2)
    assert (len(store.train), len(store.evaluation)) == (4, 2)


@pytest.mark.parametrize("item", ["a.jsonl", "a.jsonl=0", "a.jsonl=x", "=1", "a.jsonl=inf"])
def test_mix_needs_names_and_weights(item: str) -> None:
    with pytest.raises(UserError, match=f'data.mix: not of the form NAME=WEIGHT .*"{item}"'):
        prepare_rows(DataConfig(mix=(item,)), make_tokenizer())


def test_waste_of_every_way_to_pack_is_told(tmp_path: Path) -> None:
    file = write(tmp_path / "texts.jsonl", [{"text": t} for t in TEXT * 3])
    line = describe(prepare_rows(DataConfig(name=str(file), max_length=64, packing="best-fit"), make_tokenizer()))[2]
    assert line.startswith("packing: wrapped ")
    assert "best-fit (chosen)" in line
    assert line.count("padding") == 3


def test_a_saved_splits_rows_are_its_own(tmp_path: Path) -> None:
    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([{"text": TEXT[0]}]),
            "test": datasets.Dataset.from_list([{"text": TEXT[1]}]),
        }
    ).save_to_disk(tmp_path / "saved")
    stores = [
        prepare_rows(DataConfig(name=str(tmp_path / "saved"), split=split, max_length=16), make_tokenizer())
        for split in ("train", "test")
    ]
    first, second = (make_tokenizer().decode(s.train.tokens[s.train.records >= 0]) for s in stores)
    assert (TEXT[0] in first, TEXT[1] in second) == (True, True)


def test_the_same_bytes_under_another_format_are_other_records(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.txt", [{"text": TEXT[0]}])
    first = prepare_rows(DataConfig(name=str(plain), max_length=64), make_tokenizer())
    second = prepare_rows(DataConfig(name=str(plain.rename(tmp_path / "a.jsonl")), max_length=64), make_tokenizer())
    assert first.path != second.path
    assert '"text"' not in make_tokenizer().decode(second.train.tokens[second.train.records >= 0])


def test_a_share_is_not_taken_where_evaluation_has_its_own_data(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [{"text": t} for t in TEXT])
    own = write(tmp_path / "own.jsonl", [{"text": TEXT[0]}])
    config = DataConfig(name=str(train), eval_name=str(own), eval_share=0.9, key_field="nobody has it", max_length=64)
    facts = prepare_rows(config, make_tokenizer()).facts
    assert (facts["train"]["samples"], facts["eval"]["samples"]) == (len(TEXT), 1)


def test_held_out_records_without_any_loss_are_told_before_training(tmp_path: Path) -> None:
    file = write(tmp_path / "talks.jsonl", [talk(0)])
    own = write(tmp_path / "own.jsonl", [talk(1)])
    config = DataConfig(name=str(own), eval_name=str(file), loss="answers", packing="off", max_length=4)
    with pytest.raises(UserError, match=r"data: no token of the .* carries loss; raise data\.max_length"):
        prepare_rows(config, make_tokenizer())


def test_two_that_convert_a_package_at_once_both_have_it(cache: Path) -> None:
    def make(partial: Path) -> None:
        for folder in (partial, cache / "falcon-dist" / "model"):  # the second by another process meanwhile
            folder.mkdir()
            (folder / "config.json").write_text("{}")

    path = packaged._cached("model", make)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    assert not list(path.parent.glob("*.partial*"))


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("no space")])
def test_a_cache_that_takes_nothing_more_is_told(cache: Path, fault: Exception) -> None:
    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise fault

    with pytest.raises(UserError, match=r'^cache: cannot make ".*/falcon-dist/other": (No|no) space.*XDG_CACHE_HOME$'):
        packaged._cached("other", fail)
    assert not list((cache / "falcon-dist").iterdir())
    (cache / "file").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache / "file"))
        with pytest.raises(UserError, match=r'^cache: cannot make ".*": Not a directory; make room'):
            packaged._cached("other", fail)


def test_rows_of_a_recipe_are_prepared_for_runs_to_find(tmp_path: Path, cache: Path, capsys) -> None:
    data, model = write(tmp_path / "d.jsonl", [{"text": t} for t in TEXT]), write_model(tmp_path / "model")
    recipe = tmp_path / "recipes" / "r.toml"
    recipe.parent.mkdir()
    recipe.write_text(f'[model]\nname = "{model}"\n[data]\nname = "{data}"\nmax_length = 16\n')
    assert main(["prepare", "--config", str(recipe), "--set", "data.max_length=8"]) == 0
    assert " rows of 8, " in capsys.readouterr().out
    assert [file.name for file in recipe.parent.iterdir()] == ["r.toml"]
    (row_store,) = (cache / "falcon-dist" / "rows").iterdir()
    run = tmp_path / "run"
    run.mkdir()
    settings = {"model": {"name": str(model)}, "data": {"name": str(data), "max_length": 8}}
    (run / "config.json").write_text(json.dumps({"train": settings}))
    for config in (run, run / "config.json"):
        assert main(["prepare", "--config", str(config)]) == 0
        assert json.loads((run / "prepared.json").read_text())["rows"] == str(row_store)
        (run / "prepared.json").unlink()
    with pytest.raises(SystemExit):
        main(["prepare", "--config", str(run), "--resume"])
