"""Bad input: one clear line, exit code 2, nothing damaged."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from launching import BIN, environment, launch, write_inputs

from falcon_dist import checkpoint


def refused(folder: Path, *args: str) -> str:
    """Launches what cannot work; its one line."""
    done = launch(folder, *args)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    return str(write_inputs(tmp_path))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--recipe", "nowhere.toml"], "nowhere.toml"),
        (["--recipe", "dmeo"], 'no such recipe: "dmeo"; known: demo, falcon-7b'),
        (["--set", "data.nmae=x"], 'unknown key "data.nmae"; did you mean "data.name"?'),
        (["--set", "precision=fp16"], 'precision must be "bf16" or "bf16-autocast" or "fp32": "fp16"'),
        (["--nproc-per-node", "1000"], "1000"),
        (["--nproc-per-node", "two"], '"two"'),
        (["--unknown-flag"], "--unknown-flag"),
        (["--resume", "never-was"], "never-was"),
    ],
)
def test_what_the_launcher_refuses_before_anything_starts(tmp_path: Path, args: list[str], message: str) -> None:
    stderr = refused(tmp_path, *args)
    assert message in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_unknown_key_in_toml_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[optim]\nlearning_rat = 1\n")
    assert 'r.toml: unknown key "optim.learning_rat"' in refused(tmp_path, "--recipe", "r.toml")


def test_broken_toml_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[optim\n")
    assert "r.toml" in refused(tmp_path, "--recipe", "r.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, 'data.name: no such file: "'),
        ("", "data.name: no record in"),
        ('{"id": 1, "prompt": "a"}\n', "data.jsonl:1: record has neither text"),
        ('{"id": 1, "text": "a"}\n{"id"', "data.jsonl:2: not a JSON object"),
    ],
)
def test_data_that_cannot_be_used(tmp_path: Path, recipe: str, text: str | None, message: str) -> None:
    data = tmp_path / "data.jsonl"
    data.unlink()
    if text is not None:
        data.write_text(text)
    assert message in refused(tmp_path, "--recipe", recipe)


def test_model_that_is_not_there(tmp_path: Path, recipe: str) -> None:
    assert 'model.name: no such folder: "./nothing"' in refused(
        tmp_path, "--recipe", recipe, "--set", "model.name=./nothing"
    )


def test_full_disk_stops_the_run_and_damages_nothing(tmp_path: Path, recipe: str) -> None:
    """Run folders on a real file system that has room for one checkpoint but not for two.

    A mount namespace of the test's own holds it: as root directly, else through a user namespace.
    """
    runs = tmp_path / "runs"
    runs.mkdir()
    script = 'mount -t tmpfs -o size=3000k none "$1" && shift && "$@"; code=$?; cp -r runs copy; exit $code'
    rooted = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    launched = [str(BIN / "falcon-launch"), "--recipe", recipe, "--run-id", "full"]
    done = subprocess.run(
        [*rooted, "sh", "-c", script, "sh", str(runs), *launched],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "No space left on device" in done.stderr
    assert "earlier checkpoints are untouched" in done.stderr
    kept = tmp_path / "copy" / "full" / "checkpoints"
    assert checkpoint.newest_verified(kept).newest is not None
    assert checkpoint.newest_verified(kept).refused == ()
    assert not list(kept.glob("*.partial*"))
