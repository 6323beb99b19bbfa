"""Evaluation along the way, early stopping, rotation and answer-only loss, in real runs of small models."""

from __future__ import annotations

import json
from pathlib import Path

from launching import ALONE, launch, only_run, weights_digest, write_inputs

from falcon_dist import checkpoint


def test_run_evaluates_keeps_its_best_and_rotates(tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    (tmp_path / "prompts.txt").write_text("Why pin cores?\n")
    sets = (
        *("evaluate.every=2", "evaluate.prompts_file=prompts.txt", "data.loss=answers", "data.on_bad=skip"),
        *("data.template=guanaco", "data.packing=best-fit", "data.max_length=64"),
        *("checkpoint.keep_last=1", "checkpoint.keep_best=true", "checkpoint.links=results"),
    )
    flags = [word for item in sets for word in ("--set", item)]
    done = launch(tmp_path, "--nproc-per-node", "2", "--recipe", str(recipe), *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (
        "skipped 20 records: no answer to learn from",
        "best-fit (chosen)",
        "step 2: held-out loss ",
        "step 4: prompt: Why pin cores?",
    ):
        assert text in done.stdout
    run = only_run(tmp_path)
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert set(lines[0]["answers"]) == {"What is a socket?", "Why pin cores?"}
    best = min(lines, key=lambda line: line["held_out"]["loss"])["step"]
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"best", f"step-{best:06d}", "step-000008"}
    assert (run / "checkpoints" / "best").resolve().name == f"step-{best:06d}"
    assert (tmp_path / "results" / "checkpoint-8" / "config.json").is_file()
    assert "### Human: " in (run / "checkpoints" / "best" / "chat_template.jinja").read_text()


def test_early_stop_ends_well_and_a_resume_finds_nothing_left_to_do(tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    # No gain is large enough, so the first evaluation stays the best one.
    sets = ("evaluate.every=1", "evaluate.patience=2", "evaluate.min_gain=100.0", "evaluate.base=false")
    flags = [word for item in sets for word in ("--set", item)]
    done = launch(tmp_path, *ALONE, "--recipe", str(recipe), "--run-id", "r", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped early at step 3: no lower held-out loss since step 1" in done.stdout
    last = tmp_path / "runs" / "r" / "checkpoints" / "step-000003"
    before = weights_digest(last)
    again = launch(tmp_path, *ALONE, "--resume", "r")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "all 3 steps are done already" in again.stdout
    assert weights_digest(last) == before


def test_a_survivors_checkpoint_is_evaluated_before_anything_is_trained(tmp_path: Path) -> None:
    """It was written between step 2 and its evaluation, which would have ended the run."""
    recipe = write_inputs(tmp_path)
    sets = (
        *("evaluate.every=1", "evaluate.patience=1", "evaluate.min_gain=100.0", "evaluate.base=false"),
        *("checkpoint.keep_best=true", "checkpoint.every=1"),
    )
    flags = [word for item in sets for word in ("--set", item)]
    done = launch(tmp_path, "--nproc-per-node", "2", "--recipe", str(recipe), "--run-id", "r", *flags)
    assert "stopped early at step 2: no lower held-out loss since step 1" in done.stdout, done.stdout + done.stderr
    run = tmp_path / "runs" / "r"
    last = run / "checkpoints" / "step-000002"
    known, files = checkpoint.read(last).facts, json.loads((last / "manifest.json").read_text())["files"]
    assert [step for step, _ in known["evaluations"]] == [1, 2]
    told = checkpoint.manifest_text({**known, "evaluations": known["evaluations"][:1]}, files)
    (last / "manifest.json").write_text(told)
    again = launch(tmp_path, "--resume", "r", "--nproc-per-node", "2")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "stopped early at step 2: no lower held-out loss since step 1" in again.stdout
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[1]["held_out"] == lines[2]["held_out"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best", "step-000001", "step-000002"]


def test_the_command_of_2023_trains_links_and_says_what_it_understood(tmp_path: Path) -> None:
    recipe = write_inputs(tmp_path)
    old = (
        "--bf16",
        "True",
        "--use_ipex",
        "True",
        "--max_seq_length",
        "48",
        "--max_steps=2",
        "--report_to",
        "tensorboard",
    )
    also = ("--evaluation_strategy", "steps", "--eval_steps", "1", "--run-id", "r")
    done = launch(tmp_path, "--nproc_per_node", "2", "--recipe", str(recipe), *old, *also)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--bf16 True: now precision=bf16-autocast" in done.stdout
    assert "--max_seq_length 48: now data.max_length=48" in done.stdout
    assert (
        "as the recipe of 2023: --set checkpoint.links=./results --env ONEDNN_MAX_CPU_ISA=AVX512_CORE_AMX"
        in done.stdout
    )
    link = tmp_path / "results" / "checkpoint-2"
    assert link.resolve() == tmp_path / "runs" / "r" / "checkpoints" / "step-000002"
    plan = json.loads((tmp_path / "runs" / "r" / "plan.json").read_text())
    told = json.dumps(plan)
    assert "ONEDNN_MAX_CPU_ISA" in told
    written = tracked(tmp_path / "runs" / "r" / "tensorboard")
    assert set(written) >= {"train/loss", "train/learning_rate", "eval/loss", "eval/perplexity"}
    assert [step for step, _ in written["train/loss"]] == [1, 2]
    steps = (tmp_path / "runs" / "r" / "attempt_1" / "rank_0000" / "steps.jsonl").read_text().splitlines()
    assert [round(v, 4) for _, v in written["train/loss"]] == [round(json.loads(s)["loss"], 4) for s in steps]


def tracked(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads from a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    assert len(list(folder.iterdir())) == 1
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
