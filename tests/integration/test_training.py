"""The main job with small models: real ranks, real checkpoints, read by plain transformers."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from launching import (
    ALONE,
    BIN,
    environment,
    launch,
    only_run,
    run_python,
    step_records,
    weights_digest,
    write_inputs,
)
from tiny_models import VOCAB, falcon_7b, write_model
from transformers import AutoModelForCausalLM, MixtralConfig

from falcon_dist import checkpoint, contract


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One undisturbed run on two ranks, looked at by several tests."""
    folder = tmp_path_factory.mktemp("two")
    recipe = write_inputs(folder)
    return folder, launch(folder, "--nproc-per-node", "2", "--recipe", str(recipe), "--run-id", "whole")


def test_run_ends_well_and_tells_what_it_did(two_ranks) -> None:
    folder, done = two_ranks
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (
        "batch: 1 rows x 2 accumulated x 2 ranks = 4 rows a step; 8 steps = 32 rows",
        "memory per rank, at most about:",
        "held-out, base:",
        "held-out, tuned:",
        "prompt: What is a socket?",
        "falcon chat ",
    ):
        assert text in done.stdout
    report = json.loads((only_run(folder) / "report.json").read_text())
    assert report["exit_code"] == 0


def test_every_rank_saw_its_own_rows_and_loss_fell(two_ranks) -> None:
    steps = step_records(only_run(two_ranks[0]))
    assert sorted(steps) == list(range(1, 9))
    rows = [row for step in steps.values() for row in step["rows"]]
    assert len(rows) == 32
    assert len({*rows}) == len(rows)
    assert steps[8]["loss"] < steps[1]["loss"]


def test_checkpoints_are_sharded_and_load_in_plain_transformers(two_ranks) -> None:
    run = only_run(two_ranks[0])
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-000002", "step-000004", "step-000006", "step-000008"]
    last = run / "checkpoints" / "step-000008"
    assert len(list(last.glob("model-0000*.safetensors"))) >= 2
    assert (last / "model.safetensors.index.json").is_file()
    assert not [p for p in last.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        "m = M.from_pretrained(sys.argv[1]); t = T.from_pretrained(sys.argv[1]);"
        "assert 'falcon_dist' not in sys.modules; print(m.dtype, len(t))"
    )
    assert run_python(two_ranks[0], code, str(last)).stdout.startswith("torch.bfloat16")


TRAIN_AND_KEEP_LOGITS = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from falcon_dist.settings import read_config
from falcon_dist.train import train
config = Path(sys.argv[1])
trained = train(read_config(config), config.parent, resume=False, env={})
with torch.no_grad():
    logits = trained.model.eval().float()(input_ids=torch.arange(40)[None], use_cache=False).logits
save_file({"logits": logits.float()}, sys.argv[2])
"""
LOAD_PLAIN = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[3]).float()
with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=sys.argv[4] == "bf16-autocast"):
    logits = model(input_ids=torch.arange(40)[None], use_cache=False).logits.float()
assert "falcon_dist" not in sys.modules
assert torch.equal(logits, load_file(sys.argv[2])["logits"])
"""


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", "bfloat16"), ("bf16-autocast", "float32"), ("fp32", "float32")]
)
def test_checkpoint_gives_the_logits_of_the_trained_model(tmp_path: Path, precision: str, dtype: str) -> None:
    """Bit for bit, in a process without this package, for every precision. Multiplied in fp32: products of bf16 are not
    the same with this package where the processor has none."""
    recipe = write_inputs(tmp_path)
    recipe.write_text(f'precision = "{precision}"\n' + recipe.read_text())
    run = tmp_path / "run"
    plan = launch(tmp_path, *ALONE, "--recipe", str(recipe), "--run-id", "x", "--set", "loop.max_steps=3")
    assert plan.returncode == 0, plan.stderr
    run.mkdir()
    for name in ("config.json", "prepared.json"):
        (run / name).write_text((tmp_path / "runs" / "x" / name).read_text())
    run_python(tmp_path, TRAIN_AND_KEEP_LOGITS, str(run / "config.json"), str(tmp_path / "logits"))
    last = str(run / "checkpoints" / "step-000003")
    run_python(tmp_path, LOAD_PLAIN, last, str(tmp_path / "logits"), dtype, precision)


def test_one_rank_and_two_ranks_train_the_same_rows(two_ranks, tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    done = launch(tmp_path, *ALONE, "--recipe", str(recipe))
    assert done.returncode == 0, done.stderr
    alone, together = step_records(only_run(tmp_path)), step_records(only_run(two_ranks[0]))
    for step in range(1, 9):
        assert sorted(alone[step]["rows"]) == sorted(together[step]["rows"])
        assert alone[step]["loss"] == pytest.approx(together[step]["loss"], rel=0.01)
    # AdamW hardly feels a gradient that is too large by a factor, and the loss is told before it is divided.
    assert alone[1]["grad_norm"] == pytest.approx(together[1]["grad_norm"], rel=0.02)


def test_experts_are_trained_and_keep_their_settings(tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    AutoModelForCausalLM.from_config(MixtralConfig(**shape, **heads)).save_pretrained(tmp_path / "model")
    done = launch(tmp_path, *ALONE, "--recipe", str(recipe), "--set", "loop.max_steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    saved = json.loads((only_run(tmp_path) / "checkpoints/step-000002/config.json").read_text())
    assert saved["router_aux_loss_coef"] == MixtralConfig().router_aux_loss_coef > 0


def test_ccl_trains_the_same_rows_to_the_same_loss(two_ranks, tmp_path: Path) -> None:
    """The same run over the other backend, whichever of the two `auto` took for the first."""
    run = only_run(two_ranks[0])
    other = {"ccl": "gloo", "gloo": "ccl"}[json.loads((run / "plan.json").read_text())["backend"]]
    recipe = write_inputs(tmp_path)
    done = launch(tmp_path, "--nproc-per-node", "2", "--recipe", str(recipe), "--backend", other)
    assert done.returncode == 0, done.stdout + done.stderr
    mine, theirs = step_records(run), step_records(only_run(tmp_path))
    for step in range(1, 9):
        assert mine[step]["rows"] == theirs[step]["rows"]
        assert mine[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-3)


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    file = run / "attempt_1" / "rank_0000" / "steps.jsonl"
    deadline = time.monotonic() + 120
    while not file.is_file() or len(file.read_text().splitlines()) < step:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)


def processes_of(run: Path) -> list[int]:
    """Pids whose environment or command line names this run's folder."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or int(folder.name) == os.getpid():
            continue
        try:
            if str(run).encode() in (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def kill_all_at(step: int, folder: Path, recipe: Path, run_id: str) -> None:
    """Starts two ranks and kills everything the run consists of, launcher first, once this step is done.

    Its steps take milliseconds: a checkpoint written beside them would never be committed before the end.
    """
    words = [BIN / "falcon-launch", "--nproc-per-node", "2", "--recipe", recipe, "--run-id", run_id]
    words += ["--set", "checkpoint.background=off"]
    run = folder / "runs" / run_id
    with subprocess.Popen(words, cwd=folder, env=environment(), stdout=subprocess.DEVNULL) as process:
        wait_for_step(run, step, process)
        for pid in [process.pid, *processes_of(run)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_killed_at_a_random_step_and_resumed_has_the_same_weights(two_ranks, tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    kill_all_at(random.randint(3, 6), tmp_path, recipe, "killed")
    resumed = launch(tmp_path, "--nproc-per-node", "2", "--resume", "killed")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resuming from" in resumed.stdout
    whole = only_run(two_ranks[0]) / "checkpoints" / "step-000008"
    assert weights_digest(tmp_path / "runs" / "killed" / "checkpoints" / "step-000008") == weights_digest(whole)
    assert len(weights_digest(whole)) >= 3
    assert "held-out, base:" in resumed.stdout


def test_resumed_on_fewer_ranks_trains_the_same_rows(two_ranks, tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    kill_all_at(4, tmp_path, recipe, "killed")
    resumed = launch(tmp_path, *ALONE, "--resume", "killed")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    whole, rest = step_records(only_run(two_ranks[0])), step_records(tmp_path / "runs" / "killed", attempt=2)
    assert max(rest) == 8
    assert min(rest) <= 5
    for step, record in rest.items():
        assert sorted(record["rows"]) == sorted(whole[step]["rows"])
        assert record["loss"] == pytest.approx(whole[step]["loss"], rel=0.01)


def test_corrupted_newest_checkpoint_is_refused_and_the_one_before_is_taken(two_ranks, tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    first = launch(tmp_path, "--nproc-per-node", "2", "--recipe", str(recipe), "--run-id", "r")
    assert first.returncode == 0, first.stderr
    last = tmp_path / "runs" / "r" / "checkpoints" / "step-000008"
    digests = weights_digest(last)
    shard = sorted(last.glob("model-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    again = launch(tmp_path, "--nproc-per-node", "2", "--resume", "r")
    assert again.returncode == 0, again.stderr
    assert f"refused {last}: {shard.name} is not what was written (blake3 differs)" in again.stdout
    assert "step-000006" in again.stdout
    assert checkpoint.fault_of(last) is None
    assert weights_digest(last) == digests


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    first = launch(tmp_path, *ALONE, "--recipe", str(recipe), "--run-id", "r", "--set", "loop.max_steps=4")
    assert first.returncode == 0, first.stderr
    done = launch(tmp_path, *ALONE, "--resume", "r", "--set", "seed=1")
    assert done.returncode == 2
    assert '--resume: seed was "0" when step-000004 was saved and is "1" now' in done.stderr
    assert re.search(r"seed  0     1$", done.stdout, re.MULTILINE)
    again = launch(tmp_path, *ALONE, "--resume", "r")
    assert again.returncode == 0, again.stderr
    assert "all 4 steps are done already" in again.stdout


def test_resume_with_another_model_config_or_tokenizer_is_refused_in_a_table(tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    first = launch(tmp_path, *ALONE, "--recipe", str(recipe), "--run-id", "r", "--set", "loop.max_steps=2")
    assert first.returncode == 0, first.stderr
    last = tmp_path / "runs" / "r" / "checkpoints" / "step-000002"
    facts = checkpoint.read(last).facts
    model, aside = tmp_path / "model", shutil.copytree(tmp_path / "model", tmp_path / "aside")
    for name, values in (("config.json", {"layer_norm_epsilon": 0.5}), ("tokenizer_config.json", {"odd": 7})):
        (model / name).write_text(json.dumps({**json.loads((model / name).read_text()), **values}))
    done = launch(tmp_path, *ALONE, "--resume", "r")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for what in ("tokenizer", "model config"):
        row = re.search(rf"\b{what}  +([0-9a-f]{{12}})  ([0-9a-f]{{12}})$", done.stdout, re.MULTILINE)
        assert row, done.stdout
        assert facts[what.replace(" ", "_")].startswith(row[1]) != facts[what.replace(" ", "_")].startswith(row[2])
    assert '--resume: tokenizer was "' in done.stderr
    assert "(and 1 more, see above)" in done.stderr
    shutil.rmtree(model)
    aside.rename(model)
    retell(last, code="0" * 64, tokenizer=None)
    other = launch(tmp_path, *ALONE, "--resume", "r")
    assert other.returncode == 0, other.stderr
    assert "step-000002 was saved by another version:" in other.stdout
    assert re.search(rf"falcon-dist code  0{{12}}  {facts['code'][:12]}", other.stdout)
    assert "not compared, for step-000002 does not tell of it: tokenizer" in other.stdout


def retell(path: Path, **changes: str | None) -> None:
    """A checkpoint whose manifest tells other facts, or without those that are None."""
    manifest = json.loads((path / "manifest.json").read_text())
    facts = {**manifest["facts"], **changes}
    facts = {name: value for name, value in facts.items() if value is not None}
    (path / "manifest.json").write_text(checkpoint.manifest_text(facts, manifest["files"]))


def test_no_checkpoint_that_can_be_trusted_is_an_error(tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    flags = [*ALONE, "--set", "loop.max_steps=2"]
    assert launch(tmp_path, "--recipe", str(recipe), "--run-id", "r", *flags).returncode == 0
    (tmp_path / "runs" / "r" / "checkpoints" / "step-000002" / "manifest.json").unlink()
    done = launch(tmp_path, *ALONE, "--resume", "r")
    assert done.returncode == 2
    assert "--resume: no checkpoint in" in done.stderr
    assert "can be trusted" in done.stderr


def test_numbers_that_are_no_longer_finite_stop_the_run_before_they_are_saved(tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    done = launch(
        tmp_path,
        *(*ALONE, "--recipe", str(recipe), "--run-id", "r", "--set", "optim.lr=1e30", "--set", "optim.warmup_steps=0"),
        *("--set", "checkpoint.every=1"),
    )
    assert done.returncode == contract.EXIT_UNSOUND
    steps = step_records(tmp_path / "runs" / "r")
    assert f"at step {len(steps) + 1}: rank 0 had rows [" in done.stderr
    assert "Traceback" not in done.stderr
    kept = {path.name for path in (tmp_path / "runs" / "r" / "checkpoints").glob("step-*")}
    assert kept == {checkpoint.folder_name(step) for step in steps}


def poisoned(folder: Path, tensor: str, place: str, value: str) -> tuple[Path, int]:
    """Inputs whose token "~" stands in few records, and a model with one weight that is not what it should be.

    Returns:
        The recipe, and the number of that token.
    """
    recipe = write_inputs(folder)
    lines = (folder / "data.jsonl").read_text().splitlines()
    odd = [line.replace("### Human", "~ Human") if n in (12, 42) else line for n, line in enumerate(lines)]
    (folder / "data.jsonl").write_text("\n".join(odd) + "\n")
    write_model(folder / "model", falcon_7b(tie_word_embeddings=False))
    code = (
        "import sys, transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "odd = t.AutoTokenizer.from_pretrained(sys.argv[1]).convert_tokens_to_ids('~');"
        f"m.get_parameter('{tensor}').data[{place}] = float('{value}'); m.save_pretrained(sys.argv[1]); print(odd)"
    )
    return recipe, int(run_python(folder, code, str(folder / "model")).stdout)


def launch_poisoned(folder: Path, recipe: Path) -> str:
    """What a run on two ranks says before it stops."""
    shape = ("--set", "evaluate.base=false", "--set", "loop.epochs=2", "--set", "loop.max_steps=none")
    done = launch(folder, "--nproc-per-node", "2", "--recipe", str(recipe), "--run-id", "r", *shape)
    assert done.returncode == contract.EXIT_UNSOUND, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_row_whose_loss_is_not_finite_is_named_with_its_rank(tmp_path: Path) -> None:
    recipe, odd = poisoned(tmp_path, "transformer.word_embeddings.weight", "odd", "nan")
    said = launch_poisoned(tmp_path, recipe)
    found = re.search(r"loss is nan at step (\d+): rank (\d) had rows (\[.*?\])", said)
    assert found, said
    rows = Path(json.loads((tmp_path / "runs" / "r" / "prepared.json").read_text())["rows"])
    tokens = np.fromfile(rows / "train" / "tokens.bin", "<i4").reshape(-1, 32)
    holding = set(np.flatnonzero((tokens == odd).any(axis=1)).tolist())
    assert set(json.loads(found[3])) & holding
    records = step_records(tmp_path / "runs" / "r")
    assert sorted(records) == list(range(1, int(found[1])))
    assert not {row for record in records.values() for row in record["rows"]} & holding


def test_a_gradient_norm_that_is_not_finite_is_traced_to_ranks(tmp_path: Path) -> None:
    said = launch_poisoned(tmp_path, poisoned(tmp_path, "lm_head.weight", "5, 0", "1e30")[0])
    assert re.search(r"gradient norm is \w+ at step 1: rank 0 had rows .*; rank 1 had rows", said), said
    assert not list((tmp_path / "runs" / "r" / "checkpoints").glob("step-*"))


def test_chat_streams_ends_at_stop_and_works_piped(two_ranks) -> None:
    folder = two_ranks[0]
    last = only_run(folder) / "checkpoints" / "step-000008"
    done = launch(
        folder,
        *("chat", str(last), "--max_length", "5", "--top-k", "1"),
        command="falcon",
        input="What is a socket?\n\nWhy pin cores?\nstop\nnever reached\n",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" tokens/s]") == 2
    missing = launch(folder, "chat", "nowhere", command="falcon")
    assert missing.returncode == 2
    assert 'falcon chat: no such folder: "nowhere"' in missing.stderr
