"""The article's recipe on a model at hand, for tests of two sizes."""

from __future__ import annotations

import json
from pathlib import Path

from launching import launch, only_run, step_records
from tiny_models import TEXT

from falcon_dist import checkpoint


def three_steps(folder: Path, model: Path) -> Path:
    """The last checkpoint of three steps of the very recipe; only model and data are local ones of the same form."""
    data = folder / "guanaco.jsonl"
    data.write_text("".join(json.dumps({"text": TEXT[n % 2] + f" {n}"}) + "\n" for n in range(120)))
    places = ["--set", f"model.name={model}", "--set", f"data.name={data}", "--set", "loop.max_steps=3"]
    done = launch(folder, "--recipe", "falcon-7b", *places, "--nproc-per-node", "1", timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(folder)
    steps = step_records(run)
    assert sorted(steps) == [1, 2, 3]
    assert all(step["loss"] < 20 for step in steps.values())
    last = run / "checkpoints" / "step-000003"
    assert checkpoint.fault_of(last) is None
    assert any((last / "train_state").glob("optimizer*.safetensors"))
    return last
