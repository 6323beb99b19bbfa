"""Checkpoints, disks and folders that fail, and numbers that spoil weights: rows 9-13, 23-25, 32."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

from cluster.machine import wait_until

from chaos.bed import EVERY, FALCON, POISON, Bed, build_library
from chaos.expect import again, ends_well, merge, refused, stopped, unharmed
from chaos.job import END_S, Job
from chaos.table import Fault, Found

AT = 25
SLOW_FSYNC = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
/* A disk that takes its time for whatever lies below "checkpoints". */
int fsync(int fd) {
    static int (*real)(int);
    char link[64], path[4096];
    ssize_t length;
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length > 0) { path[length] = 0; if (strstr(path, "/checkpoints/")) sleep(1); }
    return real(fd);
}
"""


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


def disk_full(bed: Bed) -> Found:
    runs = bed.work / "runs"
    runs.mkdir()
    with bed.main.mounted("-t", "tmpfs", "-o", "size=5M,mode=755", "tmpfs", str(runs)):
        job = bed.train()
        job.run = bed.main.seen(job.run)
        found = stopped(bed, job, "No space left on device", (1, 2), within=120)
        kept = list((job.run / "checkpoints").glob("step-*[0-9]"))
        bed.main.remount("size=100M", runs)
        after = bed.resume()
        code = after.end()
        after.run = job.run
        return merge(found, [*([] if kept else ["no earlier checkpoint is left"]), *ends_well(bed, after, code)])


def killed_in_a_save(bed: Bed) -> Found:
    job = bed.train("--max-restarts", "2")
    job.wait_step(EVERY + 2)
    pid, root = job.pid_of(0), job.run / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(root.glob(f"step-{3 * EVERY:06d}.partial*")):
        assert time.monotonic() < deadline, job.text()[-500:]
        assert job.process.poll() is None, job.text()[-500:]
    job.mark()
    os.kill(pid, signal.SIGKILL)
    return again(bed, job, r"rank 0 .* failed first: SIGKILL")


def corrupted(bed: Bed) -> Found:
    """The newest checkpoint is damaged while nobody looks: cut short, or a page of zeros."""
    job = abandoned(bed, AT)
    newest = max((job.run / "checkpoints").glob("step-*[0-9]"))
    victim = max((p for p in newest.rglob("*.safetensors")), key=lambda p: p.stat().st_size)
    if bed.mode == "local":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        data = bytearray(victim.read_bytes())
        data[8192:12288] = bytes(4096)
        victim.write_bytes(data)
    return resumed(bed, rf"refused .*{newest.name}: .*{victim.name}", lost=2 * EVERY, reached=job.steps())


def no_shared_folder(bed: Bed) -> Found:
    """Each host has a disk of its own; a rank of the other host is killed."""
    bed.work = bed.all.disk / "apart"
    for host in bed.nodes:
        (host.disk / "apart").mkdir()
    job = bed.train("--max-restarts", "2")
    job.run = bed.main.disk / "apart/runs/r"
    job.wait_step(AT)
    job.signal_rank(1)
    return again(bed, job, r"rank 1 .* failed first: SIGKILL")


def folder_vanishes(bed: Bed) -> Found:
    """The file system with the run folder is unmounted while ranks train."""
    runs = bed.work / "runs"
    runs.mkdir()
    with bed.main.mounted("-t", "tmpfs", "-o", "mode=755", "tmpfs", str(runs)):
        job = bed.train()
        job.run = bed.main.seen(job.run)
        job.wait_step(AT)
        job.mark()
        bed.main.unmount(runs)
        return stopped(bed, job, r"No such file|vanished|is gone", (1, 2), within=30)


def read_only(bed: Bed) -> Found:
    runs = bed.work / "runs"
    runs.mkdir()
    with bed.last.mounted("-t", "tmpfs", "-o", "ro", "tmpfs", str(runs)):
        job = bed.train()
        job.mark()
        return refused(bed, job, "the run folder cannot be written")


def low_limits(bed: Bed) -> Found:
    """256 open files and 1 MB of shared memory; falcon doctor tells, the run does not need more."""
    bed.last.remount("size=1M", Path("/dev/shm"))
    try:
        seats = [] if bed.mode == "local" else ["--hosts", "node[1-2]"]
        doctor = bed.main.run("prlimit", "--nofile=256:256", FALCON, "doctor", *seats, cwd=bed.work)
        job = bed.launch([*bed.seats(), "--recipe", str(bed.inputs / "recipe.toml"), "--run-id", "r"], open_files=256)
        found = unharmed(bed, job)
    finally:
        bed.last.remount("size=50%", Path("/dev/shm"))
    lines = [line for line in doctor.stdout.splitlines() if "/dev/shm" in line]
    return merge(replace(found, cause=" ".join(lines[:1])), [] if lines else ["falcon doctor does not tell"])


def slow_disk(bed: Bed) -> Found:
    """Every fsync of a checkpoint takes a second, and a hang is called one after three."""
    library = build_library(SLOW_FSYNC, bed.work, "slow")
    flags = ["--env", f"LD_PRELOAD={library}", "--set", "launch.hang_s=3", "--set", "checkpoint.every=30"]
    return unharmed(bed, bed.train("--max-restarts", "1", *flags))


def abandoned(bed: Bed, step: int) -> Job:
    """A run whose launcher was killed after this step."""
    job = bed.train()
    job.wait_step(step)
    os.kill(job.launcher(), signal.SIGKILL)
    wait_until(lambda: not bed.left(), END_S, "the end of all")
    return job


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
    Fault(number=11, name="disk full in a save", local=disk_full, hosts=disk_full),
    Fault(number=12, name="rank 0 killed in a save", local=killed_in_a_save, hosts=killed_in_a_save, quick=True),
    Fault(number=13, name="checkpoint cut short / page of zeros", local=corrupted, hosts=corrupted),
    Fault(number=23, name="run folder vanishes / is not shared", local=folder_vanishes, hosts=no_shared_folder),
    Fault(number=24, name="run folder read-only", local=read_only, hosts=read_only, quick=True),
    Fault(number=25, name="256 open files, 1 MB of /dev/shm", local=low_limits, hosts=low_limits),
    Fault(number=32, name="each fsync of a save takes 1 s", local=slow_disk, hosts=slow_disk),
)
