import itertools

import pytest

from launcher.supervise import (
    Ended,
    Exited,
    Faulted,
    Interrupted,
    Lost,
    Mismatched,
    Prepared,
    RunState,
    SetTimer,
    SignalAll,
    StartRanks,
    TimeUp,
    begin,
    decide,
)

OK, BAD, KILLED = Ended(code=0), Ended(code=3), Ended(signal=9)
TERM, KILL = SignalAll(signal=15), SignalAll(signal=9)


def play(*events, nodes_of=(0, 0)):
    """The last state and every action, in order."""
    state, done = begin(nodes_of), []
    for event in events:
        state, actions = decide(state, event)
        done += actions
    return state, done


def ready(*nodes):
    return [Prepared(node_rank=n, ended=OK) for n in nodes or (0,)]


def exited(rank, ended=OK):
    return Exited(rank=rank, ended=ended)


def test_all_well():
    state, done = play(*ready(), exited(1), exited(0))
    assert (state.phase, state.cause, done) == ("done", None, [StartRanks()])


def test_ranks_start_when_the_last_node_is_prepared():
    state, done = play(*ready(0), nodes_of=(0, 1))
    assert (state.phase, done) == ("preparing", [])
    state, done = play(*ready(0, 1), nodes_of=(0, 1))
    assert (state.phase, done) == ("running", [StartRanks()])


def test_a_rank_that_ends_well_leaves_the_others_alone():
    state, done = play(*ready(), exited(1))
    assert (state.phase, done) == ("running", [StartRanks()])


@pytest.mark.parametrize(("ended", "code"), [(BAD, 3), (KILLED, 137), (Ended(signal=15), 143)])
def test_the_first_failure_is_the_cause(ended, code):
    state, done = play(*ready(), exited(1, ended), exited(0, Ended(signal=15)))
    assert (state.phase, state.cause.rank, state.cause.exit_code) == ("done", 1, code)
    assert done == [StartRanks(), TERM, SetTimer(seconds=3.0)]


def test_ranks_that_do_not_end_are_killed_and_then_given_up():
    events = [*ready(), exited(1, BAD), TimeUp()]
    state, done = play(*events)
    assert (state.phase, done[-2:]) == ("killing", [KILL, SetTimer(seconds=1.5)])
    assert play(*events, TimeUp())[0].phase == "done"
    assert play(*events, exited(0, KILLED))[0].phase == "done"


@pytest.mark.parametrize("number", [2, 15])
def test_an_interrupt_gives_longer_and_a_second_one_none(number):
    state, done = play(*ready(), Interrupted(signal=number))
    assert (state.phase, state.cause.exit_code) == ("stopping", 128 + number)
    assert done[-2:] == [TERM, SetTimer(seconds=5.0)]
    state, done = play(*ready(), Interrupted(signal=number), Interrupted(signal=number))
    assert (state.phase, done[-2]) == ("killing", KILL)


def test_an_interrupt_after_a_failure_hurries_but_is_not_the_cause():
    state, done = play(*ready(), exited(0, BAD), Interrupted(signal=2))
    assert (state.cause.exit_code, done[-2]) == (3, KILL)


def test_a_failed_preparation_starts_nothing():
    state, done = play(Prepared(node_rank=0, ended=BAD))
    assert (state.phase, state.cause.kind, state.cause.exit_code, done) == ("done", "prepare", 3, [])


def test_a_failed_preparation_stops_those_of_other_nodes():
    state, done = play(Prepared(node_rank=1, ended=BAD), nodes_of=(0, 1))
    assert (state.phase, done) == ("stopping", [TERM, SetTimer(seconds=3.0)])
    state, done = play(Prepared(node_rank=1, ended=BAD), *ready(0), nodes_of=(0, 1))
    assert (state.phase, StartRanks() in done) == ("done", False)


def test_an_interrupted_preparation_never_starts_ranks():
    state, done = play(Interrupted(signal=2), *ready(0))
    assert (state.phase, done) == ("done", [TERM, SetTimer(seconds=5.0)])


def test_a_lost_agent_takes_its_ranks_and_stops_the_others():
    state, done = play(*ready(0, 1), Lost(node_rank=1, text="gone"), nodes_of=(0, 1))
    assert (state.phase, state.alive, state.cause.text) == ("stopping", frozenset({0}), "gone")
    assert TERM in done
    assert play(*ready(), Lost(node_rank=0, text="gone"))[0].phase == "done"


@pytest.mark.parametrize("event", [Mismatched(rank=1, text="t"), Faulted(node_rank=0, text="t")])
def test_what_must_not_go_on(event):
    state, done = play(*ready(), event)
    assert (state.phase, state.cause.text, state.cause.exit_code) == ("stopping", "t", 1)
    assert TERM in done


EVENTS = [
    *ready(0, 1),
    *(exited(r, e) for r in (0, 1) for e in (OK, BAD)),
    Mismatched(rank=0, text="m"),
    Faulted(node_rank=1, text="f"),
    Lost(node_rank=0, text="l"),
    Interrupted(signal=2),
    TimeUp(),
]


@pytest.mark.parametrize("first", EVENTS)
def test_any_four_events_keep_the_rules(first):
    for events in itertools.product(EVENTS, repeat=3):
        state, seen = begin((0, 1)), []
        for event in (first, *events):
            before: RunState = state
            state, actions = decide(state, event)
            seen += actions
            assert before.cause is None or state.cause == before.cause  # the first cause stays
            assert state.alive <= before.alive or StartRanks() in actions
        assert seen.count(StartRanks()) <= 1
        assert StartRanks() not in seen[seen.index(TERM) :] if TERM in seen else True
        assert state.cause is not None or KILL not in seen


def test_a_peers_reset_is_not_the_cause_when_the_dead_one_is_heard_later():
    reset = Exited(rank=0, ended=Ended(code=1), echo=True)
    state, _ = play(*ready(0, 1), reset, exited(1, KILLED), nodes_of=(0, 1))
    assert (state.cause.rank, state.cause.exit_code) == (1, 137)
    state, _ = play(*ready(0, 1), reset, Lost(node_rank=1, text="gone"), nodes_of=(0, 1))
    assert state.cause.text == "gone"


@pytest.mark.parametrize("later", [Ended(signal=15), Ended(code=143)])
def test_what_we_told_to_stop_is_no_cause(later):
    state, _ = play(*ready(0, 1), Exited(rank=0, ended=Ended(code=1), echo=True), exited(1, later), nodes_of=(0, 1))
    assert state.cause.rank == 0
