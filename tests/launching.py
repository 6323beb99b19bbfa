"""Runs the installed ``falcon-launch`` and ``falcon`` as a person would, on small inputs of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_models import TEXT, write_model

BIN = Path(sys.executable).parent


def _cpu_of_worker() -> str:
    """One of the cpus that tests may use, for each worker of pytest-xdist another one."""
    cpus = sorted(os.sched_getaffinity(0))
    return str(cpus[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % len(cpus)])


ALONE = ("--nproc-per-node", "1", "--cores-list", _cpu_of_worker())
"""One rank with one thread: two would wait for each other in every layer while the other worker's ranks have a cpu."""
RECIPE = """
[model]
name = "{model}"
[data]
name = "{data}"
key_field = "id"
eval_share = 0.2
max_length = 32
[optim]
lr = 1e-3
warmup_steps = 2
[loop]
global_batch = 4
max_steps = 8
[checkpoint]
every = 2
max_shard_size = "100KB"
[evaluate]
base = true
max_new_tokens = 4
prompts = ["What is a socket?"]
"""


def write_inputs(folder: Path, records: int = 60) -> Path:
    """A model folder, a JSONL file and the recipe that names them; the recipe's path."""
    lines = [{"id": f"talk-{n // 2}", "text": f"{n}: {TEXT[n % len(TEXT)]}"} for n in range(records)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(model=write_model(folder / "model"), data=data))
    return recipe


def environment() -> dict[str, str]:
    """The caller's environment, with a cache that only tests use.

    All tests share it, for it also holds the compiled collective backend, which takes a minute to build.
    """
    return {**os.environ, "XDG_CACHE_HOME": str(Path(__file__).parents[1] / ".cache" / "tests")}


def launch(
    folder: Path, *args: str, timeout: float = 240, command: str = "falcon-launch", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a command of ours in ``folder`` to its end."""
    words = [str(BIN / command), *args]
    options = {"env": environment(), **options}
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False, **options)


def run_python(folder: Path, code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Runs a snippet with nothing of this project on its path."""
    words = [sys.executable, "-c", code, *args]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}  # DeepSpeed, which transformers may import, looks for one on stdout
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240, check=True, env=env)


def only_run(folder: Path) -> Path:
    """The one run folder that was made."""
    (run,) = (folder / "runs").iterdir()
    return run


def step_records(run: Path, attempt: int = 1) -> dict[int, dict[str, Any]]:
    """What each step was, joined over ranks: {step: {"rows": all ranks' rows, "loss": ...}}."""
    steps: dict[int, dict[str, Any]] = {}
    for file in sorted((run / f"attempt_{attempt}").glob("rank_*/steps.jsonl")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            step = steps.setdefault(record["step"], {**record, "rows": []})
            step["rows"] += record["rows"]
    return steps


def weights_digest(checkpoint: Path, names: Sequence[str] = ("model-", "train_state/optimizer-")) -> dict[str, str]:
    """Hash of every weights and optimizer file, from the manifest."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    return {name: told["blake3"] for name, told in files.items() if name.startswith(tuple(names))}
