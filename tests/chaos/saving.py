"""Checkpoints that are cut off or damaged, and numbers that spoil weights: rows 9, 10, 12, 13."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

from cluster.machine import wait_until

from chaos.bed import EVERY, POISON, Bed
from chaos.expect import again, ends_well, merge, stopped
from chaos.job import END_S, Job
from chaos.table import Fault, Found
from falcon_dist.checkpoint import folder_name
from falcon_dist.keeping import committed_steps

AT = 25


def not_finite(bed: Bed) -> Found:
    """One record has a token for which the model holds NaN."""
    inputs = bed.work / "inputs"
    shutil.copytree(bed.inputs, inputs)
    _spoil_embedding(inputs / "model")
    lines = (inputs / "data.jsonl").read_text().splitlines()
    lines[30] = json.dumps({"text": f"a record {POISON} of its own"})
    (inputs / "data.jsonl").write_text("\n".join(lines) + "\n")
    recipe = (inputs / "recipe.toml").read_text().replace(str(bed.inputs), str(inputs))
    (inputs / "recipe.toml").write_text(recipe)
    words = ["--recipe", str(inputs / "recipe.toml"), "--run-id", "r", "--set", "checkpoint.every=1"]
    job = bed.launch([*bed.seats(), *words, "--max-restarts", "3"])
    job.mark()
    found = stopped(bed, job, r"(nan|not finite).* step \d+", (3,), within=120)
    return merge(found, [*_not_finite_on_disk(job.run), *_retried(job)])


def weight_flipped(bed: Bed) -> Found:
    """One bit of one weight in one rank's memory."""
    job = bed.train("--max-restarts", "3", "--set", "loop.check_replicas=5", *bed.inside(1, AT, "flip a weight"))
    wait_until(lambda: (job.run / "attempt_1/rank_0001/injected").exists() or job.process.poll(), 120)
    job.mark()
    return merge(stopped(bed, job, r"replicas: after step \d+ .*rank 1 ", (3,), within=15), _retried(job))


def killed_in_a_save(bed: Bed) -> Found:
    job = bed.train("--max-restarts", "2")
    job.wait_step(EVERY + 2)
    pid = job.pid_of(0)
    wait_for_save(job, f"step-{3 * EVERY:06d}.partial*")
    job.mark()
    os.kill(pid, signal.SIGKILL)
    return again(bed, job, r"rank 0 .* failed first: SIGKILL")


def corrupted(bed: Bed) -> Found:
    """The newest checkpoint is damaged while nobody looks: cut short, or a page of zeros."""
    job = abandoned(bed, AT)
    newest = newest_of(job)
    victim = max((p for p in newest.rglob("*.safetensors")), key=lambda p: p.stat().st_size)
    if bed.mode == "local":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        data = bytearray(victim.read_bytes())
        data[8192:12288] = bytes(4096)
        victim.write_bytes(data)
    return resumed(bed, rf"refused .*{newest.name}: .*{victim.name}", lost=2 * EVERY, reached=job.steps())


def abandoned(bed: Bed, step: int) -> Job:
    """A run whose launcher was killed after this step."""
    job = bed.train()
    job.wait_step(step)
    os.kill(job.launcher(), signal.SIGKILL)
    wait_until(lambda: not bed.left(), END_S, "the end of all")
    return job


def newest_of(job: Job) -> Path:
    """The newest checkpoint of a run."""
    root = job.run / "checkpoints"
    return root / folder_name(max(committed_steps(root)))


def resumed(bed: Bed, named: str, *, lost: int, reached: int) -> Found:
    """The run is resumed, says what is ``named``, and comes to the same weights."""
    job = bed.resume()
    again_s = job.first_step_again()
    wrong = ends_well(bed, job, job.end())
    told, taken = job.first_line(named), job.first_line("resuming from")
    at = int(taken.text.rpartition("step-")[2]) if taken else 0
    wrong += [] if told else [f'nothing said of "{named}"']
    wrong += [] if reached - at <= lost else [f"{reached - at} steps lost, {lost} allowed"]
    return Found(
        detected_s=told.at - job.began if told else None,
        cause=told.text if told else "",
        again_s=again_s,
        steps_lost=reached - at,
        orphans=bed.count_orphans(),
        exit_code=job.process.returncode,
        wrong=tuple(wrong),
    )


def wait_for_save(job: Job, pattern: str) -> None:
    """Looks without a pause: a save is short."""
    root, deadline = job.run / "checkpoints", time.monotonic() + 60
    while not list(root.glob(pattern)):
        assert time.monotonic() < deadline, job.text()[-500:]
        assert job.process.poll() is None, job.text()[-500:]


def _spoil_embedding(model: Path) -> None:
    """NaN in what the model holds for the second byte of the odd character."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    token = AutoTokenizer.from_pretrained(model)(POISON)["input_ids"][-1]
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "word_embeddings" in name or "embed_tokens" in name)
    weights[name][token] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def _not_finite_on_disk(run: Path) -> list[str]:
    """Checkpoints that hold a NaN where the model it began with had none."""
    from safetensors.torch import load_file

    found = []
    for file in sorted(run.glob("checkpoints/step-*/model*.safetensors")):
        tensors = {n: t for n, t in load_file(file).items() if "embed" not in n}
        found += [f"{file.parent.name}: {name} is not finite" for name, t in tensors.items() if not t.isfinite().all()]
    return found[:3]


def _retried(job: Job) -> list[str]:
    return ["it was started again"] if (job.run / "attempt_2").exists() else []


FAULTS = (
    Fault(number=9, name="NaN from one sample", local=not_finite, hosts=not_finite, quick=True),
    Fault(number=10, name="a bit of a weight flips in one rank's memory", local=weight_flipped, hosts=weight_flipped),
    Fault(number=12, name="rank 0 killed in a save", local=killed_in_a_save, hosts=killed_in_a_save, quick=True),
    Fault(number=13, name="checkpoint cut short / page of zeros", local=corrupted, hosts=corrupted),
)
