"""A run that is asked to make way: what is decided, what a job that submits itself again says."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher import batch, cli, config, flags, retry, series, survey
from launcher.errors import Interruption
from launcher.events import (
    AskSave,
    AskStop,
    CanSave,
    CanStop,
    Cause,
    Ended,
    Exited,
    Interrupted,
    Lost,
    MakeWay,
    Prepared,
    Saved,
    SetTimer,
    SignalAll,
    Stalled,
    StartRanks,
    TimeUp,
)
from launcher.folder import site_of
from launcher.hostfile import Hostfile
from launcher.patience import Patience
from launcher.plan import Site
from launcher.record import Record
from launcher.report import RunReport, outcome_of
from launcher.series import past_of
from launcher.supervise import begin, decide

READY = [Prepared(node_rank=0, ended=Ended(code=0)), CanStop()]
TERM = SignalAll(signal=15)
ASKED = [StartRanks(), AskStop(), SetTimer(seconds=90.0)]


def play(*events, patience=None):
    state, done = begin((0, 0), patience), []
    for event in events:
        state, actions = decide(state, event)
        done += actions
    return state, done


def exited(rank, code):
    return Exited(rank=rank, ended=Ended(code=code))


def test_ranks_that_end_after_the_agreed_step_are_no_failure():
    state, done = play(*READY, MakeWay(), exited(1, 75), exited(0, 75))
    assert (state.phase, state.cause.kind, state.cause.exit_code) == ("done", "yield", 75)
    assert done == ASKED
    assert outcome_of(state.cause) == "stopped"


def test_a_run_that_was_done_anyway_is_done():
    state, done = play(*READY, MakeWay(), exited(1, 0), exited(0, 0))
    assert (state.phase, state.cause, done) == ("done", None, ASKED)


def test_a_rank_that_fails_on_the_way_out_is_a_failure():
    state, done = play(*READY, MakeWay(), exited(1, 9))
    assert (state.cause.kind, state.cause.rank, state.cause.exit_code) == ("rank", 1, 9)
    assert done[3] == TERM


def test_a_step_that_does_not_end_in_time():
    state, done = play(*READY, MakeWay(), TimeUp(), patience=Patience(stop_grace_s=7))
    assert (state.phase, state.cause.kind) == ("stopping", "yield")
    assert done[2:4] == [SetTimer(seconds=7), TERM]


def test_when_a_step_does_not_end_in_time_the_one_before_is_saved():
    late = [*READY, CanSave(rank=1), MakeWay(), TimeUp()]
    state, done = play(*late)
    assert (state.phase, done[-2:]) == ("saving", [AskSave(rank=1), SetTimer(seconds=60.0)])
    state, done = play(*late, Saved(rank=1))
    assert (state.phase, state.cause.kind, done[-2]) == ("stopping", "yield", TERM)
    state, done = play(*late, exited(1, 75), exited(0, 75))  # the step has ended after all
    assert (state.phase, state.cause.kind, state.cause.exit_code) == ("done", "yield", 75)


def test_ctrl_c_on_the_way_out_is_an_interrupt():
    state, _ = play(*READY, MakeWay(), Interrupted(signal=2))
    assert (state.phase, state.cause.kind, state.cause.exit_code) == ("stopping", "interrupt", 130)


@pytest.mark.parametrize("slow", [[], [TimeUp()]])
def test_who_cancels_a_run_that_makes_way_does_not_want_it_again(slow):
    state, done = play(READY[0], MakeWay(), *slow, Interrupted(signal=15))
    assert (state.phase, state.cause.kind) == ("killing" if slow else "stopping", "interrupt")
    assert (state.cause.exit_code, state.interrupted) == (143, True)
    assert done[-2] == (SignalAll(signal=9) if slow else TERM)


def test_a_program_that_cannot_be_asked_gets_sigterm_and_the_same_time():
    state, done = play(READY[0], MakeWay(), exited(0, 143), exited(1, 143))
    assert done == [StartRanks(), TERM, SetTimer(seconds=90.0)]
    assert (state.phase, state.cause.kind) == ("done", "yield")


def test_while_preparing_nothing_is_to_be_saved():
    state, done = play(MakeWay())
    assert (state.phase, state.cause.kind, done[0]) == ("stopping", "yield", TERM)


def test_a_run_that_made_way_is_not_restarted_by_its_launcher():
    past = [retry.Past(cause=Cause(kind="yield", exit_code=75), hosts=("a",))]
    assert retry.after(past, retry.Policy(max_restarts=3)) == retry.Stop()


@pytest.mark.parametrize(("kind", "wanted"), [("yield", True), ("lost", True), ("rank", False), ("interrupt", False)])
def test_slurm_is_asked_again_unless_the_user_wants_an_end(kind, wanted):
    cause = Cause(kind=kind, exit_code=75)
    head = {"run_id": "r", "attempt": 1, "run_dir": "/r", "outcome": outcome_of(cause), "exit_code": 75, "ranks": ()}
    assert RunReport(**head, cause=cause).wants_requeue == wanted
    assert not RunReport(**head, cause=cause, interrupted=True).wants_requeue


FAILED = [READY[0], CanSave(rank=0), exited(1, 9)]


@pytest.mark.parametrize(
    "events",
    [
        [*FAILED, MakeWay()],  # while the other one saves
        [*FAILED, TimeUp(), MakeWay()],
        [*READY, Stalled(text="no step"), MakeWay()],
        [*READY, MakeWay(), exited(1, 9)],
        [*READY, MakeWay(), Lost(node_rank=0, text="gone")],
    ],
)
def test_who_was_asked_to_make_way_while_something_fails_leaves_the_next_start_to_slurm(events):
    state, _ = play(*events)
    assert (state.asked_to_yield, state.cause.kind == "yield") == (True, False)
    told = Record(SimpleNamespace(site=Site(run_id="r", attempt=1, run_dir="/r", cwd="/"), nodes=()), ())
    told.enter("start", 0.0)
    report = told.report(state.cause, 1.0, asked_to_yield=state.asked_to_yield)
    assert report.wants_requeue
    assert not dataclasses.replace(report, interrupted=True).wants_requeue
    past = past_of(dataclasses.replace(report, cause=Cause(kind="rank", exit_code=9)), Hostfile(entries=()), 0)
    decided = retry.after([past], retry.Policy(max_restarts=3))
    assert decided == retry.Stop(why="not started again: it was asked to make way")


@pytest.mark.parametrize(("code", "outcome"), [(2, "failed"), (3, "failed"), (0, "ok")])
def test_what_was_refused_or_is_done_is_not_for_slurm_to_start_again(code, outcome):
    cause = Cause(kind="rank", exit_code=code) if code else None
    head = {"run_id": "r", "attempt": 1, "run_dir": "/r", "outcome": outcome, "exit_code": code, "ranks": ()}
    assert not RunReport(**head, cause=cause, asked_to_yield=True).wants_requeue


@pytest.mark.parametrize(("number", "code", "again"), [(10, 75, ["7"]), (2, 130, [])])
def test_a_signal_that_comes_before_the_first_attempt(number, code, again, tmp_path, monkeypatch):
    def interrupted(_):
        raise Interruption(number)

    requeued = []
    monkeypatch.setattr(series.Series, "run", interrupted)
    monkeypatch.setattr(batch, "requeue", lambda job, *_: requeued.append(job.job))
    monkeypatch.setattr(sys, "argv", ["falcon-launch", "--runs-dir", str(tmp_path), "--resume", "auto"])
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}.items():
        monkeypatch.setenv(name, value)
    assert (cli.main(), requeued) == (code, again)


# --resume auto


def make_run(runs: Path, name: str, *, checkpoint: bool) -> Path:
    folder = runs / name
    (folder / "checkpoints" / "step-000004" if checkpoint else folder).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.LaunchConfig().to_json()))
    return folder


def load(*words: str) -> config.LaunchConfig:
    return config.load(flags.parse(words).flags)


def test_a_named_run_goes_on_and_no_other(tmp_path):
    words = ("--runs-dir", str(tmp_path), "--run-id", "mine", "--resume", "auto")
    make_run(tmp_path, "newer", checkpoint=True)
    first = load(*words)
    assert (first.resume_from, first.launch.run_id) == (None, "mine")
    assert "no run mine" in first.notes[0]
    mine = make_run(tmp_path, "mine", checkpoint=False)  # it was ended before its first checkpoint
    again = load(*words)
    assert (again.resume_from, again.launch.run_id) == (str(mine), "mine")


def test_a_copy_of_an_attempt_in_the_run_folder_is_no_attempt(tmp_path):
    mine = make_run(tmp_path, "mine", checkpoint=True)
    for name in ("attempt_1.bak", "attempt_3", "attempt_7_old"):
        (mine / name).mkdir()
    loaded = load("--runs-dir", str(tmp_path), "--resume", "mine")
    assert site_of(loaded, dry_run=True).attempt == 4


@pytest.mark.parametrize("where", ["recipe", "--set"])
def test_a_run_is_found_wherever_its_folder_was_named(tmp_path, where):
    make_run(tmp_path / "elsewhere", "newer", checkpoint=True)
    mine = make_run(tmp_path / "elsewhere", "mine", checkpoint=False)
    recipe = tmp_path / "r.toml"
    recipe.write_text(f"[launch]\nruns_dir = '{tmp_path}/elsewhere'\nrun_id = 'mine'\n")
    sets = ("--set", f"launch.runs_dir={tmp_path}/elsewhere", "--set", "launch.run_id=mine")
    again = load(*(("--recipe", str(recipe)) if where == "recipe" else sets), "--resume", "auto")
    assert (again.resume_from, again.launch.runs_dir, again.launch.run_id) == (str(mine), str(mine.parent), "mine")


def test_auto_takes_no_run_that_was_ended_in_its_first_save(tmp_path):
    older = make_run(tmp_path, "older", checkpoint=True)
    newer = make_run(tmp_path, "newer", checkpoint=False)
    (newer / "checkpoints" / "step-000004.partial-shared12").mkdir(parents=True)
    os.utime(older / "checkpoints", (1, 1))
    assert load("--runs-dir", str(tmp_path), "--resume", "auto").resume_from == str(older)


def test_a_run_goes_on_only_where_its_newest_known_checkpoint_may_be(tmp_path):
    """On hosts in another order the first one may have none, and would begin anew."""
    mine = make_run(tmp_path, "mine", checkpoint=True)
    assert load("--runs-dir", str(tmp_path), "--resume", "mine").resume_step == 0
    for attempt, step in ((1, 4), (2, 0)):
        (mine / f"attempt_{attempt}").mkdir(exist_ok=True)
        (mine / f"attempt_{attempt}" / "report.json").write_text(json.dumps({"checkpoint_step": step}))
    (mine / "report.json").write_text('{"checkpoint_step": 0}')
    assert load("--runs-dir", str(tmp_path), "--resume", "mine").resume_step == 4
    for damaged in ("", "[]", "{}"):
        (mine / "attempt_1" / "report.json").write_text(damaged)
        assert load("--runs-dir", str(tmp_path), "--resume", "mine").resume_step == 0


def test_the_survey_counts_whole_checkpoints(tmp_path):
    for name in ("step-000004", "step-000008.partial-shared12", "step-000012.refused-7"):
        (tmp_path / "r" / "checkpoints" / name).mkdir(parents=True)
    assert survey.take("/", None, str(tmp_path / "r"))["newest_step"] == 4
