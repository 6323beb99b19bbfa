"""W&B (offline) and MLflow (in a folder) told by a run on two ranks: ``make test-trackers``."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import launch, step_records, write_inputs
from wandb.proto import wandb_internal_pb2

BLOCK = 32768
"""W&B's file is a log of LevelDB: blocks of pieces, each headed by checksum, length and kind."""
HEADER = struct.Struct("<IHB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and its trackers' files beside it."""
    folder = tmp_path_factory.mktemp("trackers")
    recipe = write_inputs(folder)
    env = ("WANDB_MODE=offline", f"WANDB_DIR={folder}", f"MLFLOW_TRACKING_URI=file:{folder}/mlruns")
    flags = [word for item in (*env, "MLFLOW_ALLOW_FILE_STORE=true") for word in ("--env", item)]
    sets = ("--set", 'report.to=["wandb", "mlflow"]', "--set", "loop.max_steps=4", "--set", "evaluate.every=2")
    done = launch(
        folder, "--nproc-per-node", "2", "--recipe", str(recipe), "--run-id", "told", *sets, *flags, "--backend", "gloo"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """What W&B itself would send from a file."""
    data, at, held = path.read_bytes(), 7, b""
    while at + HEADER.size <= len(data):
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        held += data[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in {1, 4}:
            yield wandb_internal_pb2.Record.FromString(held)
            held = b""


def losses(folder: Path) -> dict[int, float]:
    return {step: round(told["loss"], 4) for step, told in step_records(folder / "runs" / "told").items()}


def test_wandb_has_one_run_with_every_step_and_its_end(folder: Path) -> None:
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    told = list(records(file))
    (run,) = (record.run for record in told if record.HasField("run"))
    assert run.display_name == "told"
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in told
        if record.HasField("history")
    ]
    found = {row["train/global_step"]: round(row["train/loss"], 4) for row in rows if "train/loss" in row}
    assert found == losses(folder)
    assert [row["train/global_step"] for row in rows if "eval/perplexity" in row] == [2, 4]
    assert [record.exit.exit_code for record in told if record.HasField("exit")] == [0]


def test_mlflow_has_one_run_with_every_step_and_its_end(folder: Path) -> None:
    (meta,) = folder.glob("mlruns/*/*/meta.yaml")
    run = meta.parent
    text = meta.read_text()
    assert "run_name: told" in text
    assert "status: 3" in text  # finished
    lines = (run / "metrics" / "loss").read_text().splitlines()
    found = {int(step): round(float(loss), 4) for _, loss, step in (line.split() for line in lines)}
    assert found == losses(folder)
    evaluated = (run / "metrics" / "eval_perplexity").read_text().splitlines()
    assert [line.split()[2] for line in evaluated] == ["2", "4"]
