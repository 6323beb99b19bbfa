"""What is kept, what may go, and when held-out figures end a run."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from falcon_dist import keeping, measure
from falcon_dist.config import CheckpointConfig, EvaluateConfig
from falcon_dist.contract import UserError
from falcon_dist.measure import catch_up
from falcon_dist.monitor import Monitor, Point, Verdict, best_of, check_evaluate, exhausted, read_prompts


@pytest.mark.parametrize(
    ("rules", "best", "gone"),
    [
        ({}, 10, []),
        ({"keep_last": 1}, 10, [10, 20, 30, 40]),
        ({"keep_last": 3}, None, [10, 20]),
        ({"keep_last": 9}, None, []),
        ({"keep_last": 1, "keep_every": 20}, None, [10, 30]),
        ({"keep_last": 1, "keep_best": True}, 20, [10, 30, 40]),
        ({"keep_last": 1, "keep_best": True, "keep_every": 30}, None, [10, 20, 40]),
    ],
)
def test_expendable_checkpoints(rules: dict[str, Any], best: int | None, gone: list[int]) -> None:
    assert keeping.expendable([30, 10, 20, 50, 40], CheckpointConfig(**rules), best) == gone


def test_settling_rotates_links_and_leaves_what_is_no_checkpoint_of_ours(tmp_path: Path) -> None:
    root, links = tmp_path / "checkpoints", tmp_path / "results"
    rules = CheckpointConfig(keep_last=1, keep_best=True, links=str(links))
    for step in (2, 4, 6):
        (root / f"step-{step:06d}").mkdir(parents=True)
        (root / "step-note").mkdir(exist_ok=True)
        keeping.settle(root, step, rules, [Point(2, 1.0)])
    assert sorted(p.name for p in root.iterdir()) == ["best", "step-000002", "step-000006", "step-note"]
    assert (root / "best").resolve() == (root / "step-000002").resolve()
    assert sorted(p.name for p in links.iterdir()) == ["checkpoint-2", "checkpoint-6"]
    (links / "checkpoint-8").mkdir()
    (root / "step-000008").mkdir()
    with pytest.raises(UserError, match=r"checkpoint-8\" is in the way and no link"):
        keeping.settle(root, 8, rules, [Point(2, 1.0)])
    assert (root / "step-000006").is_dir()


@pytest.mark.parametrize(("keep_last", "left"), [(1, [250, 300]), (2, [200, 250, 300])])
def test_a_later_checkpoint_that_was_refused_outlives_none_that_is_sound(tmp_path, keep_last, left) -> None:
    """Resumed from 200, because a bit of 300 had flipped; 250 is the newest that can be trusted."""
    for step in (100, 200, 250, 300):
        (tmp_path / f"step-{step:06d}").mkdir()
    keeping.settle(tmp_path, 250, CheckpointConfig(keep_last=keep_last), [])
    assert keeping.committed_steps(tmp_path) == left


def test_one_that_was_refused_counts_for_nothing_once_training_is_past_it(tmp_path: Path) -> None:
    """Resumed from 1000, because a bit of 1234 had flipped; it may have been the best, too."""
    for step in (1000, 1234, 1500):
        (tmp_path / f"step-{step:06d}").mkdir()
    rules = CheckpointConfig(keep_last=2, keep_best=True)
    points = [Point(1000, 2.0), Point(1234, 1.0), Point(1500, 3.0)]
    keeping.settle(tmp_path, 1500, rules, points, refused={1234})
    assert keeping.committed_steps(tmp_path) == [1000, 1234, 1500]
    assert (tmp_path / "best").resolve().name == "step-001000"


def test_what_could_not_be_removed_is_told_and_tried_again(tmp_path: Path) -> None:
    """A file in the place of a folder, which is not removed as one."""
    left = tmp_path / "step-000002.partial-rotated-7"
    left.write_text("")
    (tmp_path / "step-000004").mkdir()
    with pytest.raises(NotADirectoryError):
        keeping.settle(tmp_path, 4, CheckpointConfig(keep_last=1), [])
    left.unlink()
    left.mkdir()
    keeping.settle(tmp_path, 4, CheckpointConfig(keep_last=1), [])
    assert not left.exists()


def test_the_best_that_is_kept_stays_where_a_better_one_could_not_be_saved(tmp_path: Path) -> None:
    """Step 4 was better than 2, but the disk was full; 8 is the next that is saved."""
    rules, best = CheckpointConfig(keep_last=1, keep_best=True), tmp_path / "best"
    points = [Point(2, 3.0), Point(4, 2.0), Point(6, 2.9), Point(8, 3.5)]
    for step in (2, 6, 8):
        (tmp_path / f"step-{step:06d}").mkdir()
        keeping.settle(tmp_path, step, rules, points[: step // 2], min_gain=0.5)
        assert best.resolve().name == "step-000002"
    assert keeping.committed_steps(tmp_path) == [2, 8]
    keeping.settle(tmp_path, 8, rules, points)
    assert best.resolve().is_dir()


def test_a_link_to_the_best_that_leads_nowhere_is_set_right_by_the_next_save(tmp_path: Path) -> None:
    """Somebody removed the checkpoint of step 4 by hand."""
    (tmp_path / "best").symlink_to("step-000004")
    for step in (2, 6):
        (tmp_path / f"step-{step:06d}").mkdir()
    keeping.settle(tmp_path, 6, CheckpointConfig(keep_best=True), POINTS)
    assert (tmp_path / "best").resolve().name == "step-000006"


POINTS = [Point(2, 3.0), Point(4, 2.5), Point(6, 2.45), Point(8, 2.6)]


def test_best_step_and_patience() -> None:
    assert best_of(POINTS) == Point(6, 2.45)
    assert best_of(POINTS, min_gain=0.1) == Point(4, 2.5)
    assert not exhausted(POINTS, 2, 0.0)
    assert exhausted(POINTS, 2, 0.1)
    assert exhausted(POINTS, 1, 0.0)
    assert not exhausted(POINTS, None, 0.0)
    assert best_of([]) is None


def test_monitor_measures_when_due_and_goes_on_from_what_it_knows() -> None:
    losses = iter([2.0, 2.2, 2.1])
    told: list[int] = []
    monitor = Monitor(
        EvaluateConfig(every=3, patience=3),
        total_steps=10,
        points=[Point(3, 2.1)],
        measure=lambda: {"held_out": {"loss": next(losses)}},
        tell=lambda step, figures: told.append(step),
    )
    verdicts = [monitor.after_step(step) for step in range(4, 11)]
    assert told == [6, 9, 10]
    assert verdicts[2] == Verdict(save=True, stop=False)
    assert verdicts[5] == verdicts[6] == Verdict()
    assert monitor.best_step == 6
    assert monitor.last is not None
    assert monitor.last[0] == 10


@pytest.mark.parametrize(
    ("start", "known", "rows", "measured"),
    [(6, 3, 5, [6]), (6, 6, 5, []), (5, 3, 5, []), (10, 9, 5, [10]), (0, 0, 5, []), (6, 3, 0, [])],
)
def test_a_resumed_run_makes_the_evaluation_that_its_checkpoint_lacks(start, known, rows, measured) -> None:
    told: list[int] = []
    monitor = Monitor(
        EvaluateConfig(every=3, patience=1),
        total_steps=10,
        points=[Point(known, 2.0)] if known else [],
        measure=lambda: {"held_out": {"loss": 2.5}},
        tell=lambda step, figures: told.append(step),
    )
    run = SimpleNamespace(store=SimpleNamespace(evaluation=range(rows)))
    verdict = catch_up(run, monitor, start)
    assert told == measured
    assert verdict.stop == monitor.stopped == bool(measured)


@pytest.mark.parametrize(
    ("config", "rows", "message"),
    [
        (EvaluateConfig(patience=1, every=2, prompts=("a",)), 0, "evaluate.patience needs held-out rows"),
        (EvaluateConfig(every=2), 0, "evaluate.every has nothing to evaluate"),
    ],
)
def test_settings_that_cannot_be_followed(config: EvaluateConfig, rows: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_evaluate(config, rows)
    assert message in str(error.value)


def test_prompts_alone_are_something_to_evaluate_on_every_rank() -> None:
    check_evaluate(EvaluateConfig(every=2, prompts=("a",)), 0)


def test_the_best_is_not_kept_where_nothing_is_evaluated() -> None:
    with pytest.raises(UserError, match="keep_best needs held-out figures"):
        keeping.check_keeping(CheckpointConfig(keep_best=True), evaluates=False)


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("One?\n\nTwo?\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "Three?\\nAnd?"}\n')
    assert read_prompts(tmp_path / "p.txt") == ["One?", "Two?"]
    assert read_prompts(tmp_path / "p.jsonl") == ["Three?\nAnd?"]
    (tmp_path / "p.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(UserError, match=r'p.jsonl:1: no text in "prompt"'):
        read_prompts(tmp_path / "p.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "nothing.txt")


def test_a_loss_that_is_no_number_is_never_the_best() -> None:
    points = [Point(1, math.nan), Point(2, 2.0), Point(3, math.inf), Point(4, 1.0)]
    assert [best_of(points[:count]) for count in range(5)] == [None, None, points[1], points[1], points[3]]
    assert not exhausted(points, 2, 0.0)


@pytest.mark.parametrize("left", ["", "{", None])
def test_what_was_measured_of_the_base_is_measured_again_where_it_was_lost(tmp_path, monkeypatch, left) -> None:
    config = SimpleNamespace(evaluate=EvaluateConfig(base=True))
    run = SimpleNamespace(folder=tmp_path, world=SimpleNamespace(is_main=True), config=config)
    measured: list[int] = []
    monkeypatch.setattr(measure, "agree_on", lambda number: number)
    monkeypatch.setattr(measure, "measure", lambda *_: (measured.append(1), {"answers": {"a": "b"}})[1])
    if left is not None:
        (tmp_path / measure.BASE_FILE).write_text(left)
    for _ in range(2):
        assert measure.measure_base(run, *[SimpleNamespace()] * 3) == {"answers": {"a": "b"}}
    assert (len(measured), [path.name for path in tmp_path.iterdir()]) == (1, [measure.BASE_FILE])
