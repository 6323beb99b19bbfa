"""A dead, frozen, absent or disagreeing rank becomes an error that names it, never a hang."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from ccl_ranks import collect, start_ranks

PROGRAM = Path(__file__).parent / "ccl_programs" / "faults.py"


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
    left = [path.name for child in children for path in Path("/dev/shm").glob(f"{child.pid}:*")]
    assert not left


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
