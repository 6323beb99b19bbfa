"""Full fine-tuning in little memory on two real ranks: it learns, and resumes to the same weights and state."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from launching import ALONE, launch, only_run, step_records, weights_digest, write_inputs
from safetensors.torch import load_file, save_file
from tiny_models import falcon_7b, write_model

from falcon_dist import contract

FLAGS = ("--nproc-per-node", "2", "--set", "strategy=full-lowmem", "--set", "loop.micro_batch=2")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lowmem")
    done = launch(folder, "--recipe", str(write_inputs(folder)), "--run-id", "whole", *FLAGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_loss_falls_on_two_ranks(whole: Path) -> None:
    steps = step_records(only_run(whole))
    assert sorted(steps) == list(range(1, 9))
    assert steps[8]["loss"] < steps[1]["loss"] - 0.1
    assert min(steps[step]["grad_norm"] for step in steps) > 0.1
    assert all(steps[step].get("busy_s") is None for step in steps)  # it cannot be told from waiting within backward


def test_resumed_on_two_ranks_has_the_same_weights_and_state(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    shutil.copytree(only_run(whole), run)
    for step in (6, 8):
        (run / "checkpoints" / f"step-{step:06d}" / "manifest.json").unlink()
    resumed = launch(tmp_path, "--resume", "r", "--nproc-per-node", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert min(step_records(run, attempt=2)) == 5
    expected = weights_digest(only_run(whole) / "checkpoints" / "step-000008")
    assert weights_digest(run / "checkpoints" / "step-000008") == expected
    assert len(expected) >= 3


def test_accumulation_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    recipe = str(write_inputs(tmp_path))
    done = launch(tmp_path, "--recipe", recipe, "--set", "strategy=full-lowmem", *ALONE)
    assert done.returncode == 2
    assert "cannot accumulate 4 micro-batches; set loop.micro_batch=4 and loop.grad_accum=1" in done.stderr


def test_a_gradient_that_is_not_finite_ends_the_run_for_good(tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    write_model(tmp_path / "model", falcon_7b(tie_word_embeddings=False))
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][5, 0] = 1e30
    save_file(weights, file, metadata={"format": "pt"})
    flags = (*FLAGS, "--set", "evaluate.base=false", "--max-restarts", "2")
    done = launch(tmp_path, "--recipe", str(recipe), "--run-id", "r", *flags)
    assert done.returncode == contract.EXIT_UNSOUND, done.stdout + done.stderr
    told = r"the norm of a gradient is \w+ at step 1: averaged over all ranks; rank 0 had rows \[.*; rank 1 had rows \["
    assert re.search(told, done.stdout + done.stderr), done.stdout + done.stderr
    assert not (tmp_path / "runs" / "r" / "attempt_2").exists()
