"""Disks and folders that are full, gone, slow or too small: rows 11, 23-25, 32."""

from __future__ import annotations

import itertools
import os
import re
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from chaos import saving
from chaos.bed import EVERY, FALCON, Bed, build_library
from chaos.expect import again, damaged, ends_well, last_words, merge, refused, traceback_of, unharmed
from chaos.job import Job
from chaos.table import Fault, Found
from falcon_dist.keeping import committed_steps

AT = 25
SHORT_HANG_S = 3
LEFT_FREE = 400_000
"""Bytes of a full disk: enough for records and reports, a fifth of a checkpoint."""
SLOW_FSYNC = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
/* A disk that takes its time for whatever lies below "checkpoints"; the file CHAOS_MARK has a line for each time. */
static void mark(const char *path) {
    FILE *file = getenv("CHAOS_MARK") ? fopen(getenv("CHAOS_MARK"), "a") : NULL;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (file) { fprintf(file, "%ld %s\n", (long)now.tv_sec, path); fclose(file); }
}
int fsync(int fd) {
    static int (*real)(int);
    char link[64], path[4096];
    ssize_t length;
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length > 0) { path[length] = 0; if (strstr(path, "/checkpoints/")) { sleep(1); mark(path); } }
    return real(fd);
}
"""
SLOW_FILES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
/* A disk that takes a second before the first byte of each file of tensors in a checkpoint. */
ssize_t write(int fd, const void *data, size_t size) {
    static ssize_t (*real)(int, const void *, size_t);
    char link[64], path[4096];
    ssize_t length;
    if (!real) real = dlsym(RTLD_NEXT, "write");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    path[length > 0 ? length : 0] = 0;
    if (strstr(path, "/checkpoints/") && strstr(path, ".safetensors") && lseek(fd, 0, SEEK_CUR) == 0) sleep(1);
    return real(fd, data, size);
}
"""


def disk_full(bed: Bed) -> Found:
    """The disk fills up amid a write for which there was room; later saves are refused before a byte."""
    runs, step = bed.work / "runs", 3 * EVERY
    runs.mkdir()
    slow = ["--env", f"LD_PRELOAD={build_library(SLOW_FILES, bed.work, 'slow')}"]
    with bed.main.mounted("-t", "tmpfs", "-o", "size=12M,mode=755", "tmpfs", str(runs)):
        job = bed.train(*slow)
        job.run = bed.main.seen(job.run)
        job.wait_step(EVERY + 2)
        ranks = [job.pid_of(rank) for rank in (0, 1)]
        saving.wait_for_save(job, f"step-{step:06d}.partial*/*")
        job.mark()
        for pid in ranks:  # or they would take what has just been given back
            os.kill(pid, signal.SIGSTOP)
        _fill(job.run, but=LEFT_FREE)
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        found = unsaved(bed, job, "No space left on device;", by=step)
        early = job.first_line("not written: No space left on device: .* needed, .* free")
        kept = committed_steps(job.run / "checkpoints")
        bed.main.remount("size=100M", runs)
        after = bed.resume()
        code = after.end()
        after.run = job.run
        wrong = ends_well(bed, after, code)
    wrong += [] if early else ["a save for which there was no room was not refused before it began"]
    wrong += [] if kept == [EVERY, 2 * EVERY] else [f"checkpoints of steps {kept} were left"]
    return merge(found, wrong)


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
        job = bed.train("--set", "loop.max_steps=300")
        job.run = bed.main.seen(job.run)
        job.wait_step(AT)
        job.mark()
        bed.main.unmount(runs)
        # The launcher's own code is 1 where its report has no place either.
        found = unsaved(bed, job, "No such file or directory", by=AT + 1.5 * EVERY, codes=(1, 2))
        return merge(found, ["a save made the vanished folder anew"] if list(runs.iterdir()) else [])


def unsaved(bed: Bed, job: Job, reason: str, *, by: float, codes: tuple[int, ...] = (2,)) -> Found:
    """Saves fail: the first one is told, ``by`` this step, training goes on, and for the last one ranks end with 2."""
    code = job.end()
    told = job.first_line(rf"^checkpoint of step \d+ was not written: {reason}")
    wrong = [*traceback_of(job), *damaged(job.run / "checkpoints")]
    if told is None:
        wrong.append(f'no save failed for "{reason}": {last_words(job)}')
    elif int(told.text.split()[3]) > by:
        wrong.append(f"told at step {told.text.split()[3]} only")
    elif job.first_line(r"^step \d+/", after=told.at) is None:
        wrong.append("training did not go on")
    if job.first_line(r"^noticed: rank \d .* failed first: exit code 2, ") is None:
        wrong.append("ranks did not end for the last save")
    return Found(
        detected_s=told.at - job.injected_at if told else None,
        cause=told.text if told else "",
        orphans=bed.count_orphans(),
        exit_code=code,
        wrong=(*wrong, *([] if code in codes else [f"exit code {code}, not one of {codes}: {last_words(job)}"])),
    )


def read_only(bed: Bed) -> Found:
    runs = bed.work / "runs"
    runs.mkdir()
    with bed.last.mounted("-t", "tmpfs", "-o", "ro", "tmpfs", str(runs)):
        job = bed.train()
        job.mark()
        return refused(bed, job, "the run folder cannot be written")


def low_limits(bed: Bed) -> Found:
    """256 open files on the first host, 1 MB of shared memory on the last; falcon doctor tells of both, the run does
    not need more.
    """
    bed.last.remount("size=1M", Path("/dev/shm"))
    try:
        seats = [] if bed.mode == "local" else ["--hosts", "node[1-2]"]
        doctor = bed.main.run("prlimit", "--nofile=256:256", FALCON, "doctor", *seats, cwd=bed.work)
        job = bed.launch([*bed.seats(), "--recipe", str(bed.inputs / "recipe.toml"), "--run-id", "r"], open_files=256)
        found = unharmed(bed, job)
    finally:
        bed.last.remount("size=50%", Path("/dev/shm"))
    first, last = ("localhost", "localhost") if bed.mode == "local" else (bed.main.name, bed.last.name)
    due = (rf"{first} +open files limited to 256", rf"{last} +shared memory \(/dev/shm\): 0\.0 GB")
    lines = [line for sign in due for line in doctor.stdout.splitlines() if re.search(sign, line)]
    said = "; ".join(" ".join(line.split()) for line in lines)
    untold = [f'falcon doctor does not tell of "{sign}"' for sign in due if not re.search(sign, doctor.stdout)]
    return merge(replace(found, cause=said), untold)


def slow_disk(bed: Bed) -> Found:
    """Every fsync of a checkpoint takes a second, and a hang is called one after three, which a save outlasts."""
    library, marks = build_library(SLOW_FSYNC, bed.work, "slow"), bed.work / "marks"
    env = ["--env", f"LD_PRELOAD={library}", "--env", f"CHAOS_MARK={marks}"]
    flags = ["--set", f"launch.hang_s={SHORT_HANG_S}", "--set", "checkpoint.every=30"]
    job = bed.train("--max-restarts", "1", *env, *flags)
    found = unharmed(bed, job)
    longest, stood = _longest_save(marks), job.report()["timings_s"]["save"]
    wrong = [f"no save took {SHORT_HANG_S} s"] if longest <= SHORT_HANG_S else []
    wrong += ["training waited for no save"] if stood <= SHORT_HANG_S else []
    said = f"a save took {longest} s, training stood still for {stood:.1f} s"
    return merge(replace(found, cause=said), wrong)


def _fill(folder: Path, *, but: int) -> None:
    """Takes all that a file system has left, also from who is writing, and gives so many bytes back."""
    block = 1 << 16
    with (folder / "filler").open("wb") as file, suppress(OSError):
        for start in itertools.count(0, block):
            os.posix_fallocate(file.fileno(), start, block)
    os.truncate(folder / "filler", (folder / "filler").stat().st_size - but)


def _longest_save(marks: Path) -> int:
    """Seconds between the first and the last fsync of a checkpoint as the preloaded library noted; 0: it did not."""
    times: dict[str, list[int]] = {}
    for line in marks.read_text().splitlines() if marks.exists() else ():
        second, path = line.split(" ", 1)
        times.setdefault(path.partition("/checkpoints/")[2].split("/")[0], []).append(int(second))
    return max((max(of_one) - min(of_one) for name, of_one in times.items() if ".partial" in name), default=0)


FAULTS = (
    Fault(number=11, name="disk full in a save", local=disk_full, hosts=disk_full),
    Fault(number=23, name="run folder vanishes / is not shared", local=folder_vanishes, hosts=no_shared_folder),
    Fault(number=24, name="run folder read-only", local=read_only, hosts=read_only, quick=True),
    Fault(number=25, name="256 open files, 1 MB of /dev/shm", local=low_limits, hosts=low_limits),
    Fault(number=32, name="each fsync of a save takes 1 s", local=slow_disk, hosts=slow_disk),
)
