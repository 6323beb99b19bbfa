"""A dead, frozen, absent or disagreeing rank becomes an error that names it, never a hang."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from ccl_ranks import collect, run_ranks, start_ranks

from falcon_dist.contract import PEER_IS_GONE

PROGRAMS = Path(__file__).parent / "ccl_programs"
PROGRAM = PROGRAMS / "faults.py"


@pytest.mark.parametrize(
    ("fault", "longest_s", "words"),
    [
        ("die", 6, r"all_reduce #2 .*the process of rank 1 \(process \d+\) has ended"),
        ("leaves", 6, r"all_reduce #2 .*the process of rank 1 \(process \d+\) has ended"),
        ("mid-transfer", 8, r"all_reduce #\d+ .*(the process of rank 1 \(process \d+\) has ended|oneCCL reported)"),
        ("freeze", 12, r"all_reduce #2 .*not finished within 8\S* s, because these have not come: rank 1"),
        ("absent", 12, r"all_reduce #2 .*not finished within 8\S* s, because these have not come: rank 1"),
        ("size", 6, r"all_reduce #2 of 1000 Float \(sum\): but rank 1 called all_reduce #2 of 999 Float"),
        ("large-size", 6, r"all_reduce #2 of 1000 Float \(sum\): but rank 1 called all_reduce #2 of 1048576"),
        ("dtype", 6, r"all_reduce #2 of 1000 Float \(sum\): but rank 1 called all_reduce #2 of 1000 Int"),
        ("operation", 6, r"all_reduce #2 of 1000 Float \(sum\): but rank 1 called broadcast #2 of 4000 bytes"),
        ("root", 6, r"reduce #2 of 1000 Float \(sum>0\): but rank 1 called reduce #2 of 1000 Float \(sum>1\)"),
        ("exchange", 6, r"all_to_all_single #2: but rank 1 expects 8 bytes of this rank, which sends 12"),
        ("ragged", 6, r"all_gather #2 of 20 bytes \(sizes \w+\): but rank 1 called all_gather #2 of 20 bytes"),
        ("gather", 6, r"ccl gather: tensor 1 of the list has 12 bytes, the root's own tensor 8"),
        ("scatter", 6, r"ccl scatter: tensor 1 of the list has 12 bytes, the root's own tensor 8"),
        ("barrier", 6, r"barrier #2: the process of rank 1 \(process \d+\) has ended"),
    ],
)
def test_rank_0_ends_with_an_error_that_names_rank_1(fault: str, longest_s: float, words: str) -> None:
    children = start_ranks(PROGRAM, fault, ranks=2)
    try:
        (first,) = collect(children[:1], timeout_s=40)
    finally:
        children[1].kill()
        children[1].communicate()
    assert first.code == 1, first.text
    assert re.search(words, first.text), first.text
    took = re.search(r"failed after (\S+) s", first.text)
    assert took
    assert float(took[1]) < longest_s
    assert not names_left(children)
    if fault in ("die", "leaves", "mid-transfer", "freeze", "absent", "barrier"):
        assert any(sign in first.text for sign in PEER_IS_GONE), first.text


def names_left(children: list[subprocess.Popen[str]]) -> list[str]:
    """What libfabric left in /dev/shm."""
    return [path.name for child in children for path in Path("/dev/shm").glob(f"{child.pid}:*")]


@pytest.mark.parametrize("workers", ["none", "two"])
def test_a_rank_waits_for_its_emergency_checkpoint(workers: str) -> None:
    """Which takes longer than it takes to see that a peer is gone; and it leaves nothing in /dev/shm."""
    cpu = min(os.sched_getaffinity(0))
    two = {"CCL_WORKER_OFFLOAD": "1", "CCL_WORKER_COUNT": "2", "CCL_WORKER_AFFINITY": ",".join([str(cpu)] * 4)}
    children = start_ranks(PROGRAMS / "emergency.py", ranks=2, **(two if workers == "two" else {}))
    try:
        first, _ = collect(children, timeout_s=60)
    finally:
        for name in names_left(children[1:]):  # nobody is there to remove them where a killed rank had workers
            Path("/dev/shm", name).unlink()
    assert "the process of rank 1" in first.text, first.text
    assert first.text.index("committed") < first.text.index("leaves"), first.text
    assert not names_left(children[:1])


def test_a_group_that_is_destroyed_with_a_queue_fails_what_is_queued() -> None:
    """What is not reduced must not be taken for reduced."""
    first, second = run_ranks(PROGRAMS / "destroyed.py", ranks=2)
    assert second.code == 0, second.text
    for done in (0, 1):
        assert f"{done}: sum 2.0" in first.text, first.text
    for queued in (2, 3):
        assert re.search(rf"{queued}: .* was destroyed while an operation was running", first.text), first.text


def test_a_rank_that_has_done_its_part_may_leave() -> None:
    for outcome in run_ranks(PROGRAMS / "early.py", ranks=3):
        assert outcome.code == 0, outcome.text


def test_a_group_is_opened_again_under_the_same_name() -> None:
    for outcome in run_ranks(PROGRAMS / "again.py", ranks=2):
        assert outcome.code == 0, outcome.text
        assert "equal" in outcome.text


def test_a_group_whose_member_never_comes_is_an_error() -> None:
    started = time.monotonic()
    children = start_ranks(PROGRAM, "none", ranks=2)
    children[1].kill()
    children[1].communicate()
    (first,) = collect(children[:1], timeout_s=60)
    assert first.code == 1, first.text
    assert time.monotonic() - started < 40


def test_a_timeout_leaves_the_stacks_of_all_ranks() -> None:
    """Also of the one that is waited for, which is in no collective."""
    children = start_ranks(PROGRAM, "absent", ranks=2)
    first, second = collect(children, timeout_s=60)
    assert first.code == 1, first.text
    assert re.search(r"all_reduce #2 .* is not finished in time\n(.*\n)*.* in all_reduce\n", first.text), first.text
    assert re.search(r"rank 0 of group 0 gives up waiting in all_reduce #2 (.*\n)*.* in misbehave\n", second.text)
