"""The attempts of a run: what follows one that failed, on which hosts, and what is told in the end."""

import dataclasses
import errno
import time
from types import SimpleNamespace

import pytest

from launcher import ledger, series, silence
from launcher.checks import judge
from launcher.cluster import HostFacts
from launcher.config import LaunchConfig, LaunchSettings
from launcher.errors import HostError, LaunchError, UserError
from launcher.events import Cause, Kind, Lost
from launcher.hostfile import parse_list
from launcher.ledger import Entry
from launcher.report import RankOutcome, RunReport, outcome_of
from launcher.supervise import begin, decide

SILENT = SimpleNamespace(say=lambda _: None, complain=lambda _: None)


def report(kind: Kind | None = None, node_rank: int | None = None) -> RunReport:
    cause = Cause(kind=kind, exit_code=1, node_rank=node_rank, text="x") if kind else None
    ranks = (RankOutcome(rank=0, local_rank=0, host="a", rank_dir="/r/0", planned_cpus="0", planned_threads=1),)
    head = {"run_id": "r", "attempt": 1, "run_dir": "/r", "outcome": outcome_of(cause), "exit_code": 1 if cause else 0}
    return RunReport(**head, cause=cause, ranks=ranks)


@pytest.fixture
def play(monkeypatch):
    """Attempts that end so, or do not come about; the last report and the hosts of each attempt."""
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def run(*ends, **allowed):
        left, hosts = list(ends), []

        def attempt(_, on):
            hosts.append("".join(entry.host for entry in on.entries))
            end = left.pop(0)
            if isinstance(end, Exception):
                raise end
            return end

        settings = LaunchSettings(max_restarts=9, **allowed)
        last = series.Series(LaunchConfig(launch=settings), parse_list("a,b,c"), attempt, SILENT).run()
        return last, hosts

    return run


GONE = LaunchError("b: no answer", ("b",))
SKEW = HostError("b: /scratch cannot be written", ("b",))


def test_a_host_that_was_lost_and_does_not_come_back_is_for_slurm_to_replace(play):
    last, hosts = play(report("lost", 1), GONE, GONE, GONE)
    assert (last.cause.kind, last.exit_code, last.wants_requeue, len(hosts)) == ("start", 1, True, 4)


def test_hosts_that_cannot_be_had_after_a_rank_failed_are_not(play):
    last, _ = play(report("rank"), GONE, GONE, GONE)
    assert (last.cause.kind, last.wants_requeue) == ("start", False)


def test_a_host_that_is_not_as_it_was_is_a_failure_like_others(play):
    last, hosts = play(report("lost", 1), SKEW, report(), min_nodes=2)
    assert (last.outcome, hosts) == ("ok", ["abc", "abc", "ac"])
    last, _ = play(report("rank"), SKEW, SKEW, SKEW)
    assert (last.exit_code, last.cause.text) == (1, "b: /scratch cannot be written")


@pytest.mark.parametrize("ends", [[SKEW], [GONE, SKEW], [report("rank"), UserError("loop.x: 3")]])
def test_what_never_was_otherwise_or_no_host_is_at_fault_for_is_refused(play, ends):
    with pytest.raises(UserError) as fault:
        play(*ends)
    assert fault.value is ends[-1]


@pytest.mark.parametrize(
    ("quiet_s", "told", "blamed"),
    [
        ((0.5, 11.0, 1.0), ["b: nothing heard for 10 s: the host, its link or its agent is dead"], True),
        ((9.2, 11.0, 1.0), ["a, b: nothing heard for 10 s: what they share, a disk or a network, may stand"], False),
        ((0.5, 9.9, 1.0), [], None),
    ],
)
def test_hosts_that_fall_silent_together_are_not_to_blame(quiet_s, told, blamed):
    now = 1000.0
    living = {
        n: SimpleNamespace(host="abc"[n], heard_at=now - quiet, held_at=0.0, fileno=lambda: 7)
        for n, quiet in enumerate(quiet_s)
    }
    dead = silence.silent(living, (), now, running=True)
    assert dead.node_ranks == (1,) * len(told)
    for text in told:
        assert dead.text.startswith(text)
        state, _ = decide(begin((0, 1, 2)), Lost(node_rank=1, text=dead.text, blamed=dead.blamed))
        past = series.past_of(dataclasses.replace(report(), cause=state.cause), parse_list("a,b,c"), 0)
        assert past.failed_hosts == (("b",) if blamed else ())


def facts(machine: str, python: str = "3.11.2") -> HostFacts:
    return HostFacts(topology=None, python="/py", python_version=python, versions={}, machine=machine)


SURVEY = {"code": "c", "cwd": True, "script": "s", "isa": "none", "disk_bytes": 1 << 40, "writable": True}


@pytest.mark.parametrize(
    ("changed", "python", "blamed"),
    [
        ({"writable": False, "place": "/scratch"}, "3.11.2", ("b",)),
        ({"code": "d"}, "3.11.2", ("b",)),
        ({}, "3.12.0", ("b",)),
    ],
)
def test_checks_name_the_host_that_differs(changed, python, blamed):
    told = [facts("1"), facts("2", python), facts("3")]
    with pytest.raises(HostError) as fault:
        judge(["a", "b", "c"], told, [SURVEY, SURVEY | changed, SURVEY], "/w", None)
    assert fault.value.hosts == blamed


def test_of_two_that_differ_neither_is_blamed():
    with pytest.raises(HostError) as fault:
        judge(["a", "b"], [facts("1"), facts("2")], [SURVEY, SURVEY | {"code": "d"}], "/w", None)
    assert fault.value.hosts == ()


def worked(first: int | None, last: int, checkpoint: int) -> RunReport:
    steps = {"first_step": first, "last_step": last, "checkpoint_step": checkpoint, "step_s": 1.0 if first else None}
    return dataclasses.replace(report("lost"), **steps)


@pytest.mark.parametrize("after", [[], [(None, 0, 0)], [(91, 95, 0)], [(91, 95, 0), (None, 0, 0), (None, 0, 0)]])
def test_attempts_that_came_to_nothing_take_no_kept_step_away(after):
    attempts = [worked(*steps) for steps in [(1, 100, 90), *after]]
    entries = [Entry(report=one, cause="x", began_s=0.0, ended_s=180.0) for one in attempts]
    assert ledger.goodput(entries) == 0.5


def test_without_a_step_there_is_no_goodput():
    entry = Entry(report=dataclasses.replace(worked(None, 0, 0), step_s=1.0), cause="x", began_s=0.0, ended_s=9.0)
    assert ledger.goodput([entry]) is None


def test_what_is_known_of_a_resumed_run_is_not_forgotten_by_an_attempt_that_saved_nothing(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    ends, known = [report("lost", 1), report()], []

    def attempt(told, _):
        known.append(told.resume_step)
        return ends.pop(0)

    asked = LaunchConfig(launch=LaunchSettings(max_restarts=1), resume_from="/r", resume_step=8)
    assert series.Series(asked, parse_list("a,b"), attempt, SILENT).run().exit_code == 0
    assert known == [8, 8]


def test_a_disk_that_is_away_between_attempts_is_a_failure_like_others(play):
    stale = OSError(errno.ESTALE, "Stale file handle", "/runs/r")
    last, hosts = play(report("rank"), stale, report())
    assert (last.outcome, len(hosts)) == ("ok", 3)
    last, _ = play(report("rank"), stale, stale, stale)
    assert (last.exit_code, last.cause.text) == (1, 'Stale file handle: "/runs/r"')
    with pytest.raises(OSError, match="Stale"):
        play(stale)
