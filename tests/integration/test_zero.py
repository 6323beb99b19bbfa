"""ZeRO on two real ranks: the losses of plain data parallelism, exact resume, checkpoints that plain programs load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from launching import launch, run_python, step_records, weights_digest, write_inputs
from saves.crew import crew
from saves.proofs import make_run

from falcon_dist import checkpoint
from falcon_dist.config import CheckpointConfig, EngineConfig, StrategyName, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.strategy import zero

RANKS = ("--nproc-per-node", "2", "--backend", "gloo")
STATE = ("model", "train_state/optimizer")
STEPS = range(1, 9)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def train(folder: Path, recipe: Path, strategy: StrategyName, *flags: str) -> Path:
    done = launch(
        folder, "--recipe", str(recipe), "--run-id", strategy, *RANKS, "--set", f"strategy={strategy}", *flags
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / strategy


@pytest.fixture(scope="module")
def plain(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Steps of plain data parallelism."""
    return step_records(train(tmp_path_factory.mktemp("ddp"), recipe, "ddp"))


LOADED = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(40)[None]
assert "falcon_dist" not in sys.modules
print(json.dumps([str(model.dtype), model(input_ids=ids, labels=ids, use_cache=False).loss.item()]))
"""


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_run_learns_as_plain_data_parallelism_and_resumes_to_the_same_bits(
    tmp_path: Path, recipe: Path, plain: dict[int, dict[str, Any]], strategy: StrategyName
) -> None:
    run = train(tmp_path, recipe, strategy, "--set", "evaluate.every=4")
    steps = step_records(run)
    assert [steps[step]["loss"] for step in STEPS] == pytest.approx([plain[step]["loss"] for step in STEPS], rel=0.01)
    assert steps[1]["grad_norm"] == pytest.approx(plain[1]["grad_norm"], rel=0.02)
    last = run / "checkpoints" / "step-000008"
    expected = weights_digest(last, STATE)
    assert len(expected) > 2
    dtype, _ = json.loads(run_python(tmp_path, LOADED, str(last)).stdout)
    assert dtype == "torch.bfloat16"
    for step in (6, 8):
        shutil.rmtree(run / "checkpoints" / f"step-{step:06d}")
    resumed = launch(tmp_path, "--resume", strategy, *RANKS)
    assert resumed.returncode == 0, resumed.stderr
    assert min(step_records(run, attempt=2)) == 5
    assert weights_digest(last, STATE) == expected


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_disk_that_is_full_at_a_save_is_told_and_training_goes_on(tmp_path: Path, strategy: StrategyName) -> None:
    run = tmp_path / "run"
    make_run(tmp_path, run, strategy=strategy, **{"loop.max_steps": 4})
    with crew("train_rank", 2, run / "attempt_1", run, False, 0.0, "/step-000002.") as ranks:
        assert ranks.end() == [0, 0], ranks.errors()
    (told,) = [line for line in ranks.told("line", "text") if line.startswith("checkpoint of step")]
    assert told == (
        "checkpoint of step 2 was not written: No space left on device; earlier ones are untouched, training goes on"
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000004"]
    assert checkpoint.fault_of(run / "checkpoints" / "step-000004") is None


def test_a_disk_that_is_full_at_the_last_save_ends_the_run_on_all_ranks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(tmp_path, run, strategy="zero2", **{"loop.max_steps": 2})
    with crew("train_rank", 2, run / "attempt_1", run, False, 0.0, "/step-000002.") as ranks:
        assert ranks.end() == [1, 1]
    assert ranks.errors().count("UserError: checkpoint: cannot write in ") == 2
    assert not list((run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        (TrainConfig(strategy="zero2", precision="bf16-autocast"), 'precision: strategy "zero2" trains bf16'),
        (TrainConfig(strategy="zero3", engine=EngineConfig(kind="ipex")), 'engine.kind: strategy "zero3" runs on'),
        (
            TrainConfig(strategy="zero1", checkpoint=CheckpointConfig(background="on")),
            "checkpoint.background: strategy",
        ),
    ],
)
def test_what_zero_cannot_follow_is_refused(config: TrainConfig, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        zero.check_zero(config)


def test_without_deepspeed_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'strategy "zero2" needs DeepSpeed, .*"falcon-dist\[deepspeed\]"'):
        zero.check_zero(TrainConfig(strategy="zero2"))
