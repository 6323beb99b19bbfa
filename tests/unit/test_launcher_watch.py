import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import effort, stacks
from launcher.standing import Stand, accuse
from launcher.watch import Watch

BACKWARD = """Current thread 0x00007f5d5fc4db80 (most recent call first):
  File "/x/torch/autograd/graph.py", line 979 in _engine_run_backward
  File "/x/torch/_tensor.py", line 623 in backward
  File "<frozen runpy>", line 88 in _run_code
"""
ELSEWHERE = """Thread 0x00007f5d2a4116c0 (most recent call first):
  File "/x/threading.py", line 327 in wait

Current thread 0x00007f5d5fc4db80 (most recent call first):
  File "/x/falcon_dist/rows.py", line 71 in batch
  File "<frozen runpy>", line 88 in _run_code
"""


def training(*seconds, least_s=60.0):
    """Two ranks whose steps took so long; and the time when the last one was done."""
    watch, now = Watch(least_s), 100.0
    for rank in (0, 1):
        watch.entered(rank, "train", now)
    for taken in (0.0, *seconds):
        now += taken
        for rank in (0, 1):
            watch.stepped(rank, now)
    return watch, now


def test_a_step_is_overdue_after_a_minute_or_five_usual_steps():
    watch, now = training(2.0, 2.0, 2.0)
    assert watch.overdue(now + 60) is None
    assert watch.overdue(now + 61) == "no rank has finished a step for 61 s (2.0 s is usual)"
    watch, now = training(30.0, 30.0, 90.0)
    assert watch.overdue(now + 150) is None
    assert watch.overdue(now + 151)


def test_where_no_step_is_due_something_is_done_all_the_same():
    watch = Watch()
    assert watch.overdue(0.0, preparing=True) is None
    for minute in range(120):  # one of two hosts works, the other one waits for it
        for node_rank, used_s in ((0, 0.0), (1, 0.2 * minute)):
            watch.heard(node_rank, used_s, 60.0 * minute)
        assert watch.overdue(60.0 * minute, preparing=True) is None
    worked = 60.0 * 119
    watch.heard(0, 0.05, worked + 1000)  # a moment of waiting
    assert watch.overdue(worked + 1800, preparing=True) is None
    said = "nothing was said and no processor time used for 1801 s while hosts prepare"
    assert watch.overdue(worked + 1801, preparing=True) == said
    watch.heard(0, None, worked + 1801)  # a line of output
    assert watch.overdue(worked + 3600, preparing=True) is None
    assert watch.overdue(worked + 10_000) is None  # a program of which nothing is known


def test_ranks_that_load_are_watched_too_unless_nothing_is_ever_due():
    for least_s, limit in ((60.0, 1800), (2.0, 20), (0.0, None)):
        watch = Watch(least_s)
        watch.heard(0, None, 0.0)
        watch.entered(0, "load", 0.0)
        assert watch.overdue(limit or 0) is None
        assert (watch.overdue((limit or 10_000) + 1) is None) == (limit is None)


def test_processor_time_is_that_of_all_that_was_started():
    busy = "import time\nwhile time.process_time() < 0.5: pass\n"
    start = f"subprocess.run([sys.executable, '-c', {busy!r}])"
    nested = (
        f"import subprocess, sys, threading, time\nthreading.Thread(target=lambda: {start}).start()\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", nested]) as process:
        try:
            deadline = time.monotonic() + 20
            while effort.used_s([process.pid]) < 0.5:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.kill()
    assert effort.used_s([process.pid]) == 0.0


def test_one_slow_rank_is_no_hang_as_long_as_another_steps():
    watch, now = training(1.0)
    watch.stepped(1, now + 100)
    assert watch.overdue(now + 101) is None


def test_nothing_is_due_while_a_rank_loads_saves_or_evaluates():
    watch, now = training(1.0)
    watch.entered(0, "save", now + 1)
    assert watch.overdue(now + 10_000) is None
    watch.entered(0, "train", now + 10_000)
    assert watch.overdue(now + 10_059) is None
    assert watch.overdue(now + 10_061)


def test_a_save_between_two_steps_does_not_count_as_a_step():
    watch, now = training(1.0, 1.0)
    for at, phase in ((1.0, "save"), (500.0, "train")):
        watch.entered(0, phase, now + at)
    watch.stepped(0, now + 501)
    assert watch.median_s == 1.0


def test_the_first_step_has_half_an_hour_and_ranks_without_phases_for_ever():
    watch = Watch()
    watch.entered(0, "train", 0.0)
    assert watch.overdue(1_799) is None
    assert watch.overdue(1_801)
    silent = Watch()
    silent.stepped(0, 1.0)
    assert silent.overdue(1e6) is None
    assert Watch(0.0).overdue(1e6) is None


@pytest.mark.parametrize(("least_s", "first_s"), [(5, 50), (59, 590), (60, 1800), (61, 1800), (180, 1800), (600, 6000)])
def test_more_patience_with_steps_is_never_less_with_the_first(least_s, first_s):
    watch = Watch(least_s)
    watch.entered(0, "train", 0.0)
    assert watch.overdue(first_s) is None
    assert watch.overdue(first_s + 1)


def test_ranks_that_ended_are_not_waited_for():
    watch, now = training(1.0)
    watch.ended(0, 0.0)
    watch.ended(1, 0.0)
    assert watch.overdue(now + 1e6) is None


def test_a_rank_that_others_have_left_behind_is_overdue_whatever_it_does():
    watch, now = training(1.0)
    for rank in (0, 1):
        watch.entered(rank, "evaluate tuned", now)
    watch.ended(0, now + 1e4)
    assert watch.overdue(now + 1e4 + 1_799) is None
    assert watch.overdue(now + 1e4 + 1_801) == "rank 1 has not ended 1800 s after another one"


def stand(rank, *, state="S", stacks=BACKWARD, step=5):
    return Stand(rank=rank, host=f"node{rank}", last_step=step, state=state, stacks=stacks)


def accused(*stands):
    told = accuse({s.rank: s for s in stands})
    return told.rank, told.text


def test_a_stopped_rank_is_accused_before_one_that_is_behind():
    assert accused(stand(0, state="T"), stand(1, step=4)) == (
        0,
        "rank 0 (host node0) is stopped (by a signal or a debugger)",
    )
    assert accused(stand(0), stand(1, step=4))[0] == 1


HOLDS = """
import ctypes, threading
threading.Thread(target=lambda: ctypes.PyDLL(None).sleep(60), daemon=True).start()
while True: pass
"""
WAITS = "import threading; threading.Event().wait()"


@pytest.mark.parametrize(("program", "state"), [(HOLDS, "L"), (WAITS, "S")])
def test_a_process_of_which_a_thread_keeps_the_interpreters_lock_is_told_from_one_that_waits(tmp_path, program, state):
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        deadline = time.monotonic() + 20
        told = ""
        while told != state and time.monotonic() < deadline:
            before = stacks.waits(process.pid)
            time.sleep(0.5)
            told = stacks.standing(process.pid, tmp_path, (stacks.waits(process.pid) - before) / 0.5)["state"]
        assert told == state
    finally:
        process.kill()
        process.wait()


def test_the_one_that_keeps_its_interpreters_lock_is_accused_where_all_wait():
    assert accused(stand(0), stand(1, state="L"))[0] == 1


def test_the_one_that_does_not_wait_for_its_peers_is_accused():
    assert accused(stand(0), stand(1, stacks=ELSEWHERE), stand(2)) == (
        1,
        "rank 1 (host node1) stands in batch (rows.py:71)",
    )


def test_nobody_is_accused_where_all_stand_alike():
    assert accused(stand(0), stand(1)) == (None, "")
    assert accused(stand(0, stacks=ELSEWHERE), stand(1, stacks=ELSEWHERE)) == (None, "")
    assert accused(stand(0, stacks=""), stand(1, stacks="")) == (None, "")
    assert accused() == (None, "")


def test_the_project_has_no_frame_that_is_taken_for_waiting_by_its_path():
    assert not [p for p in Path(__file__).parents[2].glob("falcon_dist/*.py") if "broadcast" in p.name]
