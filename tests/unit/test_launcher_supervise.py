import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from launcher.events import (
    AskSave,
    AskStacks,
    AskStop,
    CanSave,
    CanStop,
    Ended,
    Exited,
    Faulted,
    Interrupted,
    Lost,
    MakeWay,
    Mismatched,
    Prepared,
    Saved,
    SetTimer,
    SignalAll,
    Stalled,
    StartRanks,
    TimeUp,
    Traced,
)
from launcher.supervise import begin, decide

OK, BAD, KILLED, REFUSED, STOPPED = Ended(code=0), Ended(code=7), Ended(signal=9), Ended(code=2), Ended(code=75)
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


@pytest.mark.parametrize(("ended", "code"), [(BAD, 7), (KILLED, 137), (Ended(signal=15), 143)])
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
    assert (state.cause.exit_code, done[-2]) == (7, KILL)


def test_a_failed_preparation_starts_nothing():
    state, done = play(Prepared(node_rank=0, ended=BAD))
    assert (state.phase, state.cause.kind, state.cause.exit_code, done) == ("done", "prepare", 7, [])


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
    *(exited(r, e) for r in (0, 1) for e in (OK, BAD, REFUSED, STOPPED)),
    Exited(rank=0, ended=BAD, echo=True),
    Mismatched(rank=0, text="m"),
    Faulted(node_rank=1, text="f"),
    *(Lost(node_rank=n, text="l") for n in (0, 1)),
    *(CanSave(rank=r) for r in (0, 1)),
    *(Saved(rank=r) for r in (0, 1)),
    Stalled(text="s"),
    Traced(rank=1, text="t"),
    Traced(rank=None),
    CanStop(),
    MakeWay(),
    Interrupted(signal=2),
    TimeUp(),
]
ORDER = ["preparing", "running", "yielding", "tracing", "saving", "stopping", "killing", "done"]


def every_state():
    """Every state that two ranks on two nodes can come to, and every event in it."""
    waiting = [begin((0, 1))]
    seen = set(waiting)
    while waiting:
        state = waiting.pop()
        for event in EVENTS:
            after, actions = decide(state, event)
            yield state, event, after, actions
            if after not in seen:
                seen.add(after)
                waiting.append(after)


def check_step(before, event, after, actions):
    """What holds whatever happens."""
    back = (before.phase, after.phase) == ("yielding", "running")  # a rank was done before the others could end early
    assert back or ORDER.index(after.phase) >= ORDER.index(before.phase)
    assert after.alive <= before.alive or StartRanks() in actions
    assert after.preparing <= before.preparing
    assert before.cause is None or after.cause is not None or before.cause.kind == "yield"
    assert after.interrupted >= before.interrupted
    assert after.asked_to_yield >= before.asked_to_yield
    if after.phase == "yielding":
        assert (after.cause.kind, after.can_stop) == ("yield", True)
    if AskStop() in actions:
        assert (before.phase, after.phase, before.cause) == ("running", "yielding", None)
        assert isinstance(actions[-1], SetTimer)
    if StartRanks() in actions:
        assert (before.phase, after.phase, before.cause) == ("preparing", "running", None)
    if TERM in actions or KILL in actions or any(isinstance(a, AskSave) for a in actions):
        assert after.cause is not None
        assert isinstance(actions[-1], SetTimer)  # nobody waits for ever
    for action in actions:
        if isinstance(action, AskSave):
            assert action.rank in after.alive & after.can_save
            assert after.cause.exit_code not in (2, 3) or after.cause.kind != "rank"
            assert after.cause.kind in ("rank", "lost", "hang", "yield")
    if after.phase == "saving":
        assert after.writer in after.alive
    if before.phase == "done":
        assert (after.phase, actions) == ("done", ())


def test_every_event_in_every_state_keeps_the_rules():
    count = 0
    for before, event, after, actions in every_state():
        check_step(before, event, after, actions)
        count += 1
    assert count > 5_000


def test_from_every_state_time_alone_ends_what_has_a_cause():
    for _, _, state, _ in every_state():
        if state.cause is None:
            continue
        later = state
        for _ in range(6):
            later, _ = decide(later, TimeUp())
        assert later.phase == "done"


class Attempts(RuleBasedStateMachine):
    """Any number of ranks and nodes; what happens is what can happen to those that are still there."""

    @initialize(nodes=st.lists(st.integers(0, 3), min_size=1, max_size=6).map(sorted))
    def start(self, nodes):
        self.nodes = nodes
        self.state = begin(tuple(nodes))
        self.starts = 0
        self.timed = False

    def happen(self, event):
        before = self.state
        self.state, actions = decide(before, event)
        check_step(before, event, self.state, actions)
        self.starts += actions.count(StartRanks())
        self.timed = any(isinstance(a, SetTimer) for a in actions) or (self.timed and not isinstance(event, TimeUp))
        assert self.starts <= 1

    @precondition(lambda self: self.state.preparing)
    @rule(data=st.data(), ended=st.sampled_from([OK, OK, OK, BAD, KILLED]), echo=st.booleans())
    def prepared(self, data, ended, echo):
        node = data.draw(st.sampled_from(sorted(self.state.preparing)))
        self.happen(Prepared(node_rank=node, ended=ended, echo=echo and bool(ended.exit_code)))

    @precondition(lambda self: self.state.alive)
    @rule(data=st.data(), ended=st.sampled_from([OK, BAD, KILLED, REFUSED]), echo=st.booleans())
    def exits(self, data, ended, echo):
        self.happen(Exited(rank=data.draw(st.sampled_from(sorted(self.state.alive))), ended=ended, echo=echo))

    @precondition(lambda self: self.state.alive)
    @rule(data=st.data(), kind=st.sampled_from([CanSave, Saved]))
    def says(self, data, kind):
        self.happen(kind(rank=data.draw(st.sampled_from(sorted(self.state.alive)))))

    @rule(data=st.data(), kind=st.sampled_from([Lost, Faulted]))
    def fails(self, data, kind):
        self.happen(kind(node_rank=data.draw(st.sampled_from(self.nodes)), text="x"))

    @rule(event=st.sampled_from([Stalled(text="s"), Traced(rank=None), Interrupted(signal=15)]))
    def other(self, event):
        self.happen(event)

    @precondition(lambda self: self.timed)
    @rule()
    def time_up(self):
        self.happen(TimeUp())

    @invariant()
    def somebody_is_waited_for(self):
        if hasattr(self, "state") and self.state.phase != "done":
            assert self.state.alive or self.state.preparing or self.timed


TestAttempts = Attempts.TestCase
TestAttempts.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)


def test_a_survivor_saves_before_all_stop():
    events = [*ready(), CanSave(rank=0), CanSave(rank=1), exited(1, KILLED)]
    state, done = play(*events)
    assert (state.phase, done[1:]) == ("saving", [AskSave(rank=0), SetTimer(seconds=60.0)])
    state, done = play(*events, Saved(rank=0))
    assert (state.phase, done[-2:]) == ("stopping", [TERM, SetTimer(seconds=3.0)])
    assert play(*events, TimeUp())[0].phase == "stopping"
    assert play(*events, Interrupted(signal=2))[0].phase == "stopping"


SAVING = [*ready(), CanSave(rank=0), exited(1, KILLED)]


@pytest.mark.parametrize("events", [SAVING, [*ready(), Stalled(text="s")], [*ready(), exited(1, BAD)]])
def test_an_interrupt_is_remembered_whatever_was_the_first_cause(events):
    before, _ = play(*events)
    state, _ = decide(before, Interrupted(signal=2))
    assert (state.cause, before.interrupted, state.interrupted) == (before.cause, False, True)


def test_when_the_writer_ends_another_survivor_takes_over():
    state, done = play(
        *ready(), *(CanSave(rank=r) for r in range(3)), exited(1, KILLED), exited(0, BAD), nodes_of=(0,) * 3
    )
    assert (state.phase, state.writer, done[-2]) == ("saving", 2, AskSave(rank=2))


@pytest.mark.parametrize("ended", [REFUSED, Ended(code=3)])
def test_nothing_is_saved_of_what_was_refused_or_cannot_be_trusted(ended):
    state, _ = play(*ready(), CanSave(rank=0), exited(1, ended))
    assert state.phase == "stopping"


def test_a_hang_is_traced_then_saved_by_another_than_the_one_that_hangs():
    state, done = play(*ready(), CanSave(rank=0), CanSave(rank=1), Stalled(text="no step"))
    assert (state.phase, done[1:]) == ("tracing", [AskStacks(), SetTimer(seconds=5.0)])
    state, actions = decide(state, Traced(rank=0, text="rank 0 is stopped"))
    assert (state.cause.kind, state.cause.rank, state.cause.text) == ("hang", 0, "no step; rank 0 is stopped")
    assert actions[0] == AskSave(rank=1)


def test_a_peers_reset_is_not_the_cause_when_the_dead_one_is_heard_later():
    reset = Exited(rank=0, ended=Ended(code=1), echo=True)
    state, _ = play(*ready(0, 1), reset, exited(1, KILLED), nodes_of=(0, 1))
    assert (state.cause.rank, state.cause.exit_code) == (1, 137)
    state, _ = play(*ready(0, 1), reset, Lost(node_rank=1, text="gone"), nodes_of=(0, 1))
    assert state.cause.text == "gone"


def test_who_had_nothing_more_from_node_0_is_not_the_cause_when_that_is_heard_to_be_lost_later():
    cut_off = Prepared(node_rank=1, ended=BAD, echo=True)
    state, _ = play(cut_off, Lost(node_rank=0, text="node1: gone"), nodes_of=(0, 1))
    assert (state.phase, state.cause.kind, state.cause.text) == ("done", "lost", "node1: gone")
    state, _ = play(cut_off, Prepared(node_rank=0, ended=KILLED), nodes_of=(0, 1))
    assert (state.cause.node_rank, state.cause.exit_code) == (0, 137)
    state, _ = play(cut_off, Prepared(node_rank=0, ended=Ended(signal=15)), nodes_of=(0, 1))
    assert (state.cause.node_rank, state.cause.exit_code) == (1, BAD.exit_code)


@pytest.mark.parametrize("later", [Ended(signal=15), Ended(code=143)])
def test_what_we_told_to_stop_is_no_cause(later):
    state, _ = play(*ready(0, 1), Exited(rank=0, ended=Ended(code=1), echo=True), exited(1, later), nodes_of=(0, 1))
    assert state.cause.rank == 0
