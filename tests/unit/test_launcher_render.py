import json

from falcon_dist.contract import RankResult
from launcher import render
from launcher.events import Cause
from launcher.report import RankOutcome, RunReport

STEP = {
    "step": 20,
    "total": 100,
    "loss": 2.3101,
    "lr": 1.9e-05,
    "epoch": 0.2,
    "tokens_per_s": 812.3,
    "eta_s": 62.0,
}


def rank(number, **values):
    seat = {"local_rank": number, "host": "localhost", "rank_dir": f"/r/rank_{number}", "planned_threads": 1}
    return RankOutcome(**{"rank": number, "planned_cpus": str(number), "observed_cpus": str(number), **seat, **values})


def report(*ranks, cause=None, **values):
    code = cause.exit_code if cause else 0
    outcome = "failed" if cause else "ok"
    head = {"run_id": "r", "attempt": 1, "run_dir": "/runs/r", "outcome": outcome, "exit_code": code}
    return RunReport(**head, cause=cause, ranks=ranks, **values)


FAILED = report(
    rank(0, signal=15),
    rank(1, code=3, stderr_tail=("Traceback", "ValueError: x")),
    rank(2, signal=15),
    cause=Cause(kind="rank", rank=1, node_rank=0, exit_code=3),
)


def test_steps():
    assert render.step_line(STEP) == (
        "step 20/100  loss 2.31  learning_rate 1.9e-05  epoch 0.20  812 tokens/s  eta 1:02"
    )
    assert render.progress_line(STEP) == "step 20/100  20%  loss 2.31  812 tokens/s  eta 1:02"
    assert render.step_line({"step": 1}) == "step 1"


def test_a_failure_names_rank_reason_and_log():
    assert render.failure_text(FAILED).splitlines() == [
        "rank 1 (local_rank 1, host localhost) failed first: exit code 3",
        "  Traceback",
        "  ValueError: x",
        "  log: /r/rank_1/stderr",
        "other ranks: 2 SIGTERM",
    ]


def test_a_refused_input_is_its_one_line():
    refused = report(
        rank(0, code=2, stderr_tail=("warning: x", "data: no rows")),
        cause=Cause(kind="rank", rank=0, node_rank=0, exit_code=2),
    )
    assert render.failure_text(refused).splitlines()[1] == "  data: no rows"


def test_a_failed_preparation():
    failed = report(
        rank(0, observed_cpus=None),
        cause=Cause(kind="prepare", node_rank=0, exit_code=1),
        prepare_tail=("KeyError: 'a'",),
    )
    assert render.failure_text(failed).splitlines() == ["preparing failed: exit code 1", "  KeyError: 'a'"]


def test_a_killed_rank_is_named_by_its_signal():
    killed = report(rank(0, signal=9), cause=Cause(kind="rank", rank=0, node_rank=0, exit_code=137))
    assert "failed first: SIGKILL" in render.failure_text(killed)


def test_the_end_of_a_good_run():
    good = report(rank(0, code=0), rank(1, code=0), timings_s={"prepare": 1.25, "train": 3.0}, summary=("loss 1",))
    assert render.closing_text(good).splitlines() == [
        "loss 1",
        "outcome: ok, exit code 0, 2 ranks",
        "time: prepare 1.2 s, train 3.0 s",
        "bindings: as planned on all ranks (rank 0: cpus 0, rank 1: cpus 1)",
        "run folder: /runs/r",
    ]


def test_bindings_that_differ_are_a_table():
    text = render.closing_text(report(rank(0, code=0, bound_cpus="1")))
    assert "rank  planned cpus  kernel's  rank's own\n0     0             0         1" in text


def test_of_a_progress_bar_the_last_state_is_shown():
    assert render.output_line(1, "10%\r20%\r30%") == "[rank 1] 30%"
    assert render.output_line(None, "x\r") == "[prepare] x"


def test_report_json_round_trip():
    told = report(rank(0, code=0, result=RankResult(status="ok", last_step=3)), FAILED.ranks[1], cause=FAILED.cause)
    assert RunReport.from_json(json.loads(json.dumps(told.to_json()))) == told
