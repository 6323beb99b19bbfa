"""chat, compare and preview as people use them, on small models."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from launching import RECIPE, launch
from tiny_models import falcon_7b, falcon_rw, make_model, make_tokenizer, write_model
from transformers import PreTrainedTokenizerFast

from falcon_dist import chat as chat_verb
from falcon_dist.__main__ import main
from falcon_dist.chat import chat
from falcon_dist.chat_template import find_template
from falcon_dist.compare import compare
from falcon_dist.contract import UserError
from falcon_dist.generate import Held, Sampling, prompt_text, reply, stop_mark
from falcon_dist.preview import preview


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a run folder with a model in it that answers differently, and data."""
    path = tmp_path_factory.mktemp("chat")
    write_model(path / "base")
    tuned = path / "runs" / "r" / "checkpoints" / "step-000002"
    make_model(falcon_7b(), seed=1).save_pretrained(tuned)
    make_tokenizer().save_pretrained(tuned)
    lines = [{"prompt": f"What is {n}?", "completion": f" It is {n} | and\nmore."} for n in range(30)]
    (path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"name": str(path / "data.jsonl"), "eval_share": 0.3, "loss": "answers", "max_length": 64}
    (path / "runs/r/config.json").write_text(json.dumps({"train": {"data": data, "evaluate": {"prompts": ["Hi?"]}}}))
    return path


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setenv("COLUMNS", "100")


def spoken(monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))


def test_a_talk_remembers_until_reset_and_ends_at_stop(folder: Path, monkeypatch, capsys) -> None:
    seen: list[str] = []

    def watched(model, tokenizer, messages, *rest):
        seen.append(prompt_text(messages, tokenizer))
        return reply(model, tokenizer, messages, *rest)

    monkeypatch.setattr(chat_verb, "reply", watched)
    spoken(monkeypatch, "One?\n\nTwo?\n/reset\nThree?\nstop\nnever reached\n")
    assert chat([str(folder / "base"), "--max_length=3", "--top_k", "1", "--system", "Be brief."]) == 0
    begin = "<|system|>Be brief.<|end|><|user|>"
    assert seen[0] == f"{begin}One?<|end|><|assistant|>"
    assert seen[1].startswith(f"{begin}One?<|end|><|assistant|>")
    assert seen[1].endswith("<|end|><|user|>Two?<|end|><|assistant|>")
    assert seen[2] == f"{begin}Three?<|end|><|assistant|>"
    assert capsys.readouterr().out.count(" tokens/s]") == 3


def test_a_talk_that_grows_too_long_forgets_its_oldest_turns(folder: Path) -> None:
    model, tokenizer = make_model(falcon_7b(max_position_embeddings=64)), make_tokenizer()
    talk = chat_verb.Talk(model, tokenizer, Sampling(max_new_tokens=8))
    for number in range(6):
        assert talk.say(f"Question number {number}?").tokens <= 8


class Terminal(io.StringIO):
    """Lines that a person types; at an empty one they press Ctrl-C instead."""

    def isatty(self) -> bool:
        return True

    def readline(self, *_: object) -> str:
        if line := super().readline():
            return line
        raise KeyboardInterrupt


def interrupted(monkeypatch: pytest.MonkeyPatch, at: str) -> list[str]:
    """Ctrl-C in the middle of the answer to ``at``; what the model reads."""
    seen: list[str] = []

    def watched(model, tokenizer, messages, *rest):
        seen.append(prompt_text(messages, tokenizer))
        if messages[-1]["content"] == at:
            raise KeyboardInterrupt
        return reply(model, tokenizer, messages, *rest)

    monkeypatch.setattr(chat_verb, "reply", watched)
    return seen


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_talk(folder: Path, monkeypatch, capsys) -> None:
    seen = interrupted(monkeypatch, "Two?")
    monkeypatch.setattr("sys.stdin", Terminal("One?\nTwo?\nThree?\n"))
    assert chat([str(folder / "base"), "--max-length=3"]) == 0
    said = capsys.readouterr()
    assert (said.out.count(" tokens/s]"), said.err.count("[interrupted: this prompt is forgotten]")) == (2, 1)
    assert ["Two?" in text for text in seen] == [False, True, False]
    assert ["One?" in text for text in seen] == [True, True, True]


def test_ctrl_c_ends_what_nobody_sits_before(folder: Path, monkeypatch, capsys) -> None:
    interrupted(monkeypatch, "One?")
    spoken(monkeypatch, "One?\nTwo?\n")
    assert main(["chat", str(folder / "base")]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_system_turn_that_no_model_would_read_is_refused(folder: Path, tmp_path: Path) -> None:
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('users only') }}{% endif %}x")
    words = [str(folder / "base"), "--system", "Be brief.", "--template"]
    with pytest.raises(UserError, match=r'--system: the chat template refuses it: "Be brief.": users only; leave it'):
        chat([*words, str(refusing)])
    with pytest.raises(UserError, match=r'--system: the model has no chat template: "Be brief."; give one with'):
        chat_verb._check_system("Be brief.", plain_tokenizer())


def plain_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def test_a_hub_name_may_be_one_word(tmp_path: Path, monkeypatch, capsys) -> None:
    hub = tmp_path / "models--gpt2"
    write_model(hub / "snapshots" / ("a" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    spoken(monkeypatch, "One?\n")
    assert chat(["gpt2", "--max-length=3"]) == 0
    assert " tokens/s]" in capsys.readouterr().out
    with pytest.raises(UserError, match='falcon chat: no such folder: "gpt3"'):
        chat(["gpt3"])


def test_prompts_file_gives_one_json_object_an_answer(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "p.txt").write_text("One?\nTwo?\n")
    assert chat([str(folder / "base"), "--prompts", str(tmp_path / "p.txt"), "--json", "--max-length", "4"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in told] == ["One?", "Two?"]
    assert set(told[0]) == {"prompt", "answer", "tokens", "seconds", "tokens_per_s"}
    assert all(0 < line["tokens"] <= 4 for line in told)


def test_seed_decides_and_top_k_1_is_greedy(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "p.txt").write_text("One?\n")

    def say(*flags: str) -> str:
        chat([str(folder / "base"), "--prompts", str(tmp_path / "p.txt"), "--json", "--max-length", "12", *flags])
        return str(json.loads(capsys.readouterr().out)["answer"])

    assert say("--seed", "1") == say("--seed", "1") != say("--seed", "2")
    assert say("--top-k", "1", "--seed", "1") == say("--top-k", "1", "--seed", "2")


def test_the_2023_command_line_answers_through_the_program(folder: Path) -> None:
    cpu = str(min(os.sched_getaffinity(0)))
    args = ("chat", "--checkpoints", str(folder / "base"), "--max_length", "4", "--top_k", "10", "--cpus", cpu)
    done = launch(folder, *args, command="falcon", input="Hello\nstop\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" tokens/s]") == 1
    quantized = launch(folder, *args, "--quantize", "int8", command="falcon", input="Hello\n")
    assert quantized.returncode == 0, quantized.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], 'falcon chat: no such folder: "nowhere"'),
        ([], "falcon chat: which model?"),
        (["base", "--top-p", "0"], 'falcon chat: --top-p must be above 0 and at most 1: "0.0"'),
        (["base", "--temperature", "0"], 'falcon chat: --temperature must be above 0: "0.0"'),
        (["base", "--max-length", "0"], 'falcon chat: --max-length must be at least 1: "0"'),
        (["base", "--cpus", "1-"], 'falcon chat: --cpus must be of those this process may use: "1-"'),
        (["base", "--cpus", "99999"], '"99999"'),
        (["base", "--prompts", "none.txt"], 'prompts: no such file: "none.txt"'),
    ],
)
def test_what_chat_refuses(folder: Path, monkeypatch, flags: list[str], message: str) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as error:
        chat(flags)
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "mark"), [("guanaco", "### Human:"), ("chatml", "<|im_end|>"), ("falcon", None)])
def test_stop_marks_of_templates(name: str, mark: str | None) -> None:
    tokenizer = make_tokenizer()
    assert stop_mark(tokenizer) is None
    tokenizer.chat_template = find_template(name)
    assert stop_mark(tokenizer) == mark


def test_answers_end_before_the_next_speaker(folder: Path) -> None:
    model, tokenizer = make_model(falcon_7b()), make_tokenizer()
    tokenizer.chat_template = find_template("guanaco")
    said = tokenizer(" Yes.### Human: More")["input_ids"]
    queue = iter(said)

    def forced(input_ids, **_):
        logits = torch.full((1, input_ids.shape[1], model.config.vocab_size), -1e9)
        logits[0, -1, next(queue)] = 0.0
        return type("Output", (), {"logits": logits, "past_key_values": None, "__contains__": lambda *_: False})()

    heard: list[str] = []
    model.forward = forced  # type: ignore[method-assign]
    found = reply(
        model, tokenizer, [{"role": "user", "content": "?"}], Sampling(max_new_tokens=len(said)), heard.append
    )
    assert found.text == "".join(heard).strip() == "Yes."


def test_text_that_may_begin_a_stop_mark_is_held_back() -> None:
    heard: list[str] = []
    held = Held("###", heard.append)
    for piece in ("a #", "# b #", "## c"):
        held.add(piece)
    held.add("", last=True)
    assert heard[0] == "a "
    assert "".join(heard) == "a ## b "


def test_compare_in_every_format(folder: Path, capsys) -> None:
    base, tuned = str(folder / "base"), str(folder / "runs/r/checkpoints/step-000002")
    found = {}
    for form in ("text", "markdown", "json"):
        assert compare([base, tuned, "--format", form, "--max-length", "6", "--prompt", "Pipe | and\nbreak?"]) == 0
        found[form] = capsys.readouterr().out
    values = json.loads(found["json"])
    assert values["gain"] == pytest.approx(values["base"]["held_out"]["loss"] - values["tuned"]["held_out"]["loss"])
    assert values["base"]["held_out"]["tokens"] == values["tuned"]["held_out"]["tokens"] > 0
    assert values["base"]["answers"] != values["tuned"]["answers"]
    assert set(values["base"]["answers"]) == {"Pipe | and\nbreak?", "Hi?"}
    assert f"held-out, {values['rows']} rows of {folder}/data.jsonl:" in found["text"]
    assert f"perplexity {values['tuned']['held_out']['perplexity']:.2f}" in found["text"]
    assert "| tuned" in found["text"]
    assert "| Pipe \\| and<br>break? |" in found["markdown"]


def test_compare_on_data_of_ones_own_and_into_a_file(folder: Path, tmp_path: Path) -> None:
    base, out = str(folder / "base"), tmp_path / "report.json"
    (tmp_path / "own.txt").write_text("Something else.\nAnd more of it.\n")
    assert compare([base, base, "--data", str(tmp_path / "own.txt"), "--format", "json", "--output", str(out)]) == 0
    values = json.loads(out.read_text())
    assert (values["gain"], values["base"]["held_out"]["records"]) == (0.0, 2)
    with pytest.raises(UserError, match="nothing to compare on"):
        compare([base, base])


def test_compare_on_the_first_rows(folder: Path, capsys) -> None:
    base, tuned = str(folder / "base"), str(folder / "runs/r/checkpoints/step-000002")

    def told(*words: str) -> dict:
        assert compare([base, tuned, "--format", "json", "--max-length", "1", *words]) == 0
        return json.loads(capsys.readouterr().out)

    few, all_of_them = told("--rows", "1"), told("--rows", "999")
    assert (few["rows"], few["of_rows"]) == (1, all_of_them["rows"])
    assert all_of_them["rows"] == all_of_them["of_rows"] > 1
    assert 0 < few["tuned"]["held_out"]["tokens"] < all_of_them["tuned"]["held_out"]["tokens"]
    assert compare([base, tuned, "--rows", "1", "--max-length", "1"]) == 0
    assert f"held-out, the first 1 of {few['of_rows']} rows of {folder}/data.jsonl:" in capsys.readouterr().out
    with pytest.raises(UserError, match='--rows must be at least 1: "0"'):
        compare([base, tuned, "--rows", "0"])


def test_first_rows_without_loss_are_refused(folder: Path, tmp_path: Path) -> None:
    base = str(folder / "base")
    (tmp_path / "d.jsonl").write_text('{"prompt": "a long question of many words ", "completion": "yes"}\n' * 9)
    (tmp_path / "r.json").write_text('{"train": {"data": {"name": "x", "loss": "answers", "max_length": 4}}}')
    words = ["--config", str(tmp_path / "r.json"), "--data", str(tmp_path / "d.jsonl"), "--rows", "1"]
    with pytest.raises(UserError, match='--rows: no token of the first rows carries loss: "1"; give a higher number'):
        compare([base, base, *words])


def test_models_with_alibi_are_measured_on_a_record_a_row(folder: Path, tmp_path: Path, capsys) -> None:
    """Two records that would share a packed row: their losses are those that each has by itself."""
    alibi, data = str(write_model(tmp_path / "alibi", falcon_rw())), tmp_path / "d.jsonl"
    texts = ["What is a socket?", "Why pin cores?"]

    def losses(*records: str) -> list[float]:
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in records))
        words = [alibi, str(folder / "base"), "--data", str(data), "--format", "json", "--precision", "fp32"]
        assert compare(words) == 0
        told = json.loads(capsys.readouterr().out)["base"]["held_out"]
        return [told["loss"] * told["tokens"], told["tokens"]]

    apart = [losses(text) for text in texts]
    assert losses(*texts) == pytest.approx([sum(sums) for sums in zip(*apart, strict=True)])
    with pytest.raises(UserError, match=r"set data\.packing=false"):
        preview([str(data), "--model", alibi])
    assert preview([str(data), "--model", alibi, "--set", "data.packing=false"]) == 0


def test_compare_names_the_sets_of_a_mix(folder: Path, tmp_path: Path, capsys) -> None:
    data = json.loads((folder / "runs/r/config.json").read_text())["train"]["data"]
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"train": {"data": {**data, "name": "unused", "mix": [f"{data['name']}=1"]}}}))
    base = str(folder / "base")
    assert compare([base, base, "--config", str(config)]) == 0
    assert f" rows of {data['name']}:" in capsys.readouterr().out


def test_preview_shows_rows_counts_lengths_and_duplicates(folder: Path, tmp_path: Path, capsys) -> None:
    data = tmp_path / "d.jsonl"
    records = [{"prompt": "2 + 2 =", "completion": " 4"}, {"text": "plain"}, {"prompt": "2 + 2 =", "completion": " 4"}]
    data.write_text("".join(json.dumps(r) + "\n" for r in records))
    flags = ["--model", str(folder / "base"), "--set", "data.loss=answers", "--set", "data.on_bad=skip", "--rows", "1"]
    assert preview([str(data), *flags]) == 0
    out = capsys.readouterr().out
    assert "2 + 2 =[ 4<|end|>]" in out
    assert "== row 0: " in out
    assert "skipped 1 records: no answer to learn from" in out
    assert "record lengths in tokens: " in out
    assert f"duplicates: 1 of 2 records\n  {data}:1 comes 2 times" in out
    assert "\033[" not in out
    assert preview([str(data), *flags, "--color", "always"]) == 0
    assert "\033[32m[ 4<|end|>]\033[0m" in capsys.readouterr().out


def test_preview_takes_a_recipe(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "d.jsonl").write_text('{"id": 1, "text": "a b c"}\n{"id": 2, "text": "d e f"}\n')
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        "[launch]\nnproc_per_node = 2\n" + RECIPE.format(model=folder / "base", data=tmp_path / "d.jsonl")
    )
    assert preview(["--config", str(recipe), "--set", "data.eval_share=0.0"]) == 0
    assert "train: 2 records" in capsys.readouterr().out
    with pytest.raises(UserError, match=r'unknown key "data.nmae"'):
        preview(["--set", "data.nmae=x"])
    with pytest.raises(UserError, match='no such run or recipe: "dmeo"; known recipes: demo'):
        preview(["--config", "dmeo"])
