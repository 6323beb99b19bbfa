import dataclasses

import pytest

from launcher.events import Cause
from launcher.retry import Again, Past, Policy, Stop, after

HOSTS = ("a", "b", "c")
FREELY = Policy(max_restarts=100)


def past(kind="rank", exit_code=137, *, host=None, step=0, oom=False, hosts=HOSTS):
    cause = Cause(kind=kind, exit_code=exit_code)
    return Past(cause=cause, hosts=hosts, failed_hosts=(host,) if host else (), checkpoint_step=step, out_of_memory=oom)


def test_a_run_that_went_well_or_was_interrupted_or_has_no_restarts_is_over():
    assert after([Past(cause=None, hosts=HOSTS)], FREELY) == Stop()
    assert after([past("interrupt", 130)], FREELY) == Stop()
    assert after([past()], Policy()) == Stop()


@pytest.mark.parametrize(
    ("one", "word"),
    [
        (past("rank", 2), "cannot be used"),
        (past("prepare", 2), "cannot be used"),
        (past("rank", 3), "cannot be trusted"),
        (past("rank", 132), "instruction"),
        (past("binding", 1), "bound otherwise"),
        (past(oom=True), "out of memory"),
    ],
)
def test_what_would_end_the_same_way_is_not_started_again(one, word):
    decided = after([one], FREELY)
    assert isinstance(decided, Stop)
    assert word in decided.why


def test_a_failure_after_which_the_user_asked_to_end_is_the_last():
    asked = dataclasses.replace(past(), interrupted=True)
    assert after([asked], FREELY) == Stop(why="not started again: it was interrupted")


@pytest.mark.parametrize("kind", ["rank", "prepare", "agent", "lost", "hang", "start"])
def test_other_failures_are_started_again_at_once(kind):
    assert after([past(kind, 1)], FREELY) == Again(delay_s=1.0, hosts=HOSTS)


def test_the_number_of_restarts_is_kept_to():
    decided = after([past(step=1), past(step=2), past(step=3)], Policy(max_restarts=2))
    assert decided == Stop(why="not started again: 2 restarts were allowed (--max-restarts)")
    assert isinstance(after([past(step=1), past(step=2)], Policy(max_restarts=2)), Again)


def test_three_restarts_without_a_new_checkpoint_are_enough():
    assert after([past(step=5)] * 4, FREELY) == Stop(
        why="not started again: 3 restarts in a row brought no new checkpoint"
    )
    assert isinstance(after([past(step=5)] * 3, FREELY), Again)
    assert isinstance(after([past(step=5)] * 3 + [past(step=6)], FREELY), Again)


def test_delays_double_until_there_is_progress():
    assert [after([past()] * n, FREELY).delay_s for n in (1, 2, 3)] == [1.0, 2.0, 4.0]
    assert after([past(), past(), past(step=1)], FREELY).delay_s == 1.0


def test_a_host_that_failed_twice_is_left_out_where_enough_are_left():
    twice = [past("lost", 1, host="b", step=1), past("start", 1, host="b", step=2)]
    assert after(twice[:1], Policy(max_restarts=9, min_nodes=2)).without == ()
    assert after(twice, Policy(max_restarts=9, min_nodes=2)) == Again(delay_s=1.0, hosts=("a", "c"), without=("b",))
    assert after(twice, Policy(max_restarts=9, min_nodes=3)).hosts == HOSTS
    assert after(twice, FREELY).hosts == HOSTS


@pytest.mark.parametrize(
    ("micro_batches", "kept", "spare"),
    [(None, "acd", ""), (12, "acd", ""), (8, "ac", "d"), (5, "abcd", "")],
)
def test_so_many_hosts_are_left_as_a_steps_rows_can_be_divided_among(micro_batches, kept, spare):
    """Of four with a rank each, the second has failed twice."""
    names = tuple("abcd")
    one = dataclasses.replace(past(host="b", hosts=names), ranks=dict.fromkeys(names, 1), micro_batches=micro_batches)
    decided = after([one, one], Policy(max_restarts=9, min_nodes=2))
    assert (decided.hosts, decided.spare) == (tuple(kept), tuple(spare))
    assert decided.without == tuple(name for name in names if name not in kept)


def test_two_hosts_that_die_together_are_both_left_out():
    lost = past("lost", 1, step=3, hosts=("a", "b", "c", "d"))
    gone = dataclasses.replace(past("start", 1, step=3, hosts=("a", "b", "c", "d")), failed_hosts=("b", "c"))
    decided = after([lost, gone, gone], Policy(max_restarts=10, min_nodes=2))
    assert isinstance(decided, Again)
    assert (decided.hosts, decided.without) == (("a", "d"), ("b", "c"))
