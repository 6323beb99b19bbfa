"""Hosts, links, launchers and clocks that fail: rows 5-7, 14, 17, 19, 22."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from cluster.machine import command, wait_until

from chaos.bed import EVERY, STEPS, Bed, build_library
from chaos.expect import SILENT_S, again, ends_well, merge, refused, unharmed
from chaos.job import END_S, Job
from chaos.table import Fault, Found

AT = 25
SLOW = ("rate", "8mbit", "burst", "160kb", "latency", "800ms")  # a burst takes the largest packet of a loopback
SHIFTED_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
/* The wall clock is off by as many seconds as the file CHAOS_CLOCK says, looked at ten times a second; the file
   CHAOS_MARK has a line for each rank that was told another time. */
static void mark(long seconds) {
    FILE *file = getenv("CHAOS_MARK") ? fopen(getenv("CHAOS_MARK"), "a") : NULL;
    if (file) { fprintf(file, "%s %ld\n", getenv("RANK") ? getenv("RANK") : "-", seconds); fclose(file); }
}
static long offset(void) {
    static int (*real)(clockid_t, struct timespec *);
    static long seconds, before;
    static struct timespec last;
    struct timespec now;
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    real(CLOCK_MONOTONIC, &now);
    if ((now.tv_sec - last.tv_sec) * 10 + (now.tv_nsec - last.tv_nsec) / 100000000 > 0) {
        FILE *file = getenv("CHAOS_CLOCK") ? fopen(getenv("CHAOS_CLOCK"), "r") : NULL;
        last = now;
        if (file) { if (fscanf(file, "%ld", &seconds) != 1) seconds = 0; fclose(file); }
        if (seconds != before) mark(before = seconds);
    }
    return seconds;
}
int clock_gettime(clockid_t id, struct timespec *told) {
    static int (*real)(clockid_t, struct timespec *);
    int code;
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    code = real(id, told);
    if (code == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) told->tv_sec += offset();
    return code;
}
int gettimeofday(struct timeval *told, void *zone) {
    struct timespec now;
    int code = clock_gettime(CLOCK_REALTIME, &now);
    told->tv_sec = now.tv_sec;
    told->tv_usec = now.tv_nsec / 1000;
    return code;
}
time_t time(time_t *told) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (told) *told = now.tv_sec;
    return now.tv_sec;
}
"""


def agent_killed(bed: Bed) -> Found:
    """All of a host but the launcher: what is left of a lost host where there is one only."""
    job = bed.train("--max-restarts", "2")
    job.wait_step(AT)
    doomed = [*job.agents(), job.pid_of(0), job.pid_of(1)]
    job.mark()
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return again(bed, job, "localhost: the agent is gone", lost=EVERY)


def host_lost(bed: Bed) -> Found:
    """It falls silent and comes back when it is missed."""
    job = bed.train("--max-restarts", "3")
    job.wait_step(AT)
    job.mark()
    bed.last.cut()
    bed.last.kill()
    _wait_for_notice(job)
    bed.last.reboot()
    return again(bed, job, "node2: nothing heard for 10 s", within=SILENT_S, slack_s=SILENT_S)


def host_frozen(bed: Bed) -> Found:
    """Nothing of a host moves any more but the launcher: silence where there is no link to cut."""
    job = bed.train("--max-restarts", "2")
    job.wait_step(AT)
    frozen = [*job.agents(), job.pid_of(0), job.pid_of(1)]
    job.mark()
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    return again(bed, job, "localhost: nothing heard for 10 s", within=SILENT_S, slack_s=SILENT_S, lost=EVERY)


def link_cut(bed: Bed) -> Found:
    job = bed.train("--max-restarts", "2")
    job.wait_step(AT)
    job.mark()
    bed.last.cut()
    try:
        _wait_for_notice(job)
        wait_until(lambda: not bed.last.find("falcon_dist"), END_S, "the end of ranks behind the cut")
    finally:
        bed.last.heal()
    return again(bed, job, "node2: nothing heard for 10 s", within=SILENT_S, slack_s=2 * SILENT_S)


def slow_link(bed: Bed) -> Found:
    job = bed.train()
    job.wait_step(5)
    device = "lo" if bed.mode == "local" else "eth0"
    netns = ("ip", "netns", "exec", bed.last.netns, "tc", "qdisc")
    job.mark()
    command(*netns, "add", "dev", device, "root", "tbf", *SLOW)
    try:
        job.wait_step(STEPS - 4, timeout=240)
    finally:
        command(*netns, "del", "dev", device, "root")
    return unharmed(bed, job, "communication takes")


def clock_jumps(bed: Bed) -> Found:
    """The wall clock jumps an hour ahead and two back while ranks train."""
    shifted, env = _shifted_clock(bed, 0)
    flags = [word for name, value in env.items() for word in ("--env", f"{name}={value}")]
    job = bed.train("--max-restarts", "1", *flags, env=env)
    job.wait_step(AT)
    job.mark()
    for offset in (3600, -3600):
        shifted(offset)
        wait_until(lambda now=offset: _told(bed, now) >= {"0", "1"}, 30, "another time in both ranks")
    return unharmed(bed, job)


def clock_is_off(bed: Bed) -> Found:
    """One host's clock is an hour ahead from the start."""
    _, env = _shifted_clock(bed, 3600)
    with bed.last.login_environment(env):
        job = bed.train("--max-restarts", "1")
        found = unharmed(bed, job, r"node2: .*clock is \+3600")
    return merge(found, [] if _told(bed, 3600) else ["its clock was right"])


def launcher_killed(bed: Bed) -> Found:
    """Its hosts notice and end all; the run is resumed by hand."""
    job = bed.train()
    job.wait_step(AT)
    pid = job.launcher()
    job.mark()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not bed.left(), END_S, "the end of all")
    gone_s, reached = time.monotonic() - job.injected_at, job.steps()
    after = bed.resume()
    after.mark()
    again_s = after.first_step_again()
    wrong = ends_well(bed, after, after.end())
    line = after.first_line("resuming from")
    resumed_at = int(line.text.rpartition("step-")[2]) if line else 0
    return Found(
        detected_s=gone_s,
        cause=line.text if line else "",
        again_s=again_s,
        steps_lost=reached - resumed_at,
        orphans=bed.count_orphans(),
        exit_code=after.process.returncode,
        wrong=(*wrong, *([] if reached - resumed_at <= EVERY else ["more lost than a save interval"])),
    )


def own_name_is_loopback(bed: Bed) -> Found:
    lines = ["127.0.0.1 localhost", "127.0.1.1 node1", f"{bed.all[1].address} node2"]
    hosts_file = bed.work / "hosts"
    hosts_file.write_text("\n".join(lines) + "\n")
    with bed.main.mounted("--bind", str(hosts_file), "/etc/hosts"):
        job = bed.train()
        return unharmed(bed, job, "" if bed.mode == "local" else r"/etc/hosts:2")


def firewall(bed: Bed) -> Found:
    """Nothing but ssh gets through."""
    rules = "".join(
        f"chain {hook} {{ type filter hook {hook} priority 0; tcp sport 22 accept; tcp dport 22 accept; "
        "meta l4proto tcp drop; }\n"
        for hook in ("input", "output")
    )
    netns = ("ip", "netns", "exec", bed.last.netns, "nft")
    command(*netns, "-f", "-", input=f"table inet chaos {{\n{rules}}}\n")
    try:
        job = bed.train()
        named = "firewall" if bed.mode == "local" else "node2 .*reach"
        return refused(bed, job, named, (1, 2), within=40)
    finally:
        command(*netns, "delete", "table", "inet", "chaos")


def _wait_for_notice(job: Job) -> None:
    wait_until(job.noticed, 40, "a word of the lost host")


def _shifted_clock(bed: Bed, offset: int) -> tuple[Callable[[int], None], dict[str, str]]:
    told = bed.work / "offset"
    told.write_text(f"{offset}\n")
    library = build_library(SHIFTED_CLOCK, bed.work, "clock")

    def shift(seconds: int) -> None:
        told.write_text(f"{seconds}\n")

    return shift, {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(told), "CHAOS_MARK": str(bed.work / "marks")}


def _told(bed: Bed, offset: int) -> set[str]:
    """Ranks, and "-" for other processes, whose clock was off by this: the library was loaded there."""
    with suppress(FileNotFoundError):
        lines = (bed.work / "marks").read_text().splitlines()
        return {line.split()[0] for line in lines if line.endswith(f" {offset}")}
    return set()


FAULTS = (
    Fault(number=5, name="whole host lost", local=agent_killed, hosts=host_lost, quick=True),
    Fault(number=6, name="host frozen / link cut without a word", local=host_frozen, hosts=link_cut),
    Fault(number=7, name="slow link (8 Mbit/s)", local=slow_link, hosts=slow_link),
    Fault(number=14, name="clock skew of an hour", local=clock_jumps, hosts=clock_is_off),
    Fault(number=17, name="launcher killed (SIGKILL)", local=launcher_killed, hosts=launcher_killed),
    Fault(number=19, name="host's name is 127.0.1.1 to itself", local=own_name_is_loopback, hosts=own_name_is_loopback),
    Fault(number=22, name="firewall drops all but ssh", local=firewall, hosts=firewall, quick=True),
)
