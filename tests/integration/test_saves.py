"""Saves that are killed, runs that go on, bits that flip: a slice of each series of ``make test-saves``; and ranks that
change their number, or are asked to make way, while a save is under way."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import step_records
from saves.crew import crew
from saves.proofs import (
    EVERY,
    STEPS,
    copy_run,
    final_weights,
    flip_bits,
    kill_and_resume,
    kill_savers,
    make_run,
    undisturbed_run,
)

from falcon_dist import checkpoint
from falcon_dist.contract import EXIT_STOPPED, STOP_SIGNAL

SLOW_S = 0.1
"""A disk that takes so long for each file: a save of a dozen of them outlasts several steps."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    return make_run(folder, folder / "run")


@pytest.fixture(scope="module")
def two_ranks(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing happened to."""
    folder = tmp_path_factory.mktemp("two")
    undisturbed_run(folder, prepared, 2)
    return folder / "undisturbed-2"


def test_killed_at_any_moment_of_a_save_the_newest_told_checkpoint_loads(tmp_path: Path) -> None:
    ledger = kill_savers(tmp_path, 25)
    assert ledger.met("between two saves") < 15, f"the kills came between the saves, not within them\n{ledger}"


def test_killed_and_resumed_any_number_of_times_the_weights_are_the_same(prepared: Path, tmp_path: Path) -> None:
    kill_and_resume(tmp_path, prepared, 3)


def test_a_flipped_bit_in_any_file_is_caught_and_named(two_ranks: Path) -> None:
    ledger = flip_bits(two_ranks / "checkpoints" / checkpoint.folder_name(STEPS), 10)
    names = {"config.json", "tokenizer.json", "manifest.json", "train_state/counters.json"}
    assert all(ledger.met(name) == 10 for name in names)


def attempts(run: Path, worlds: Sequence[int]) -> list[dict[int, dict[str, object]]]:
    """One attempt after the other with another number of ranks; all but the last are killed after some saves."""
    for number, world_size in enumerate(worlds, start=1):
        with crew("train_rank", world_size, run / f"attempt_{number}", run, number > 1) as ranks:
            if number == len(worlds):
                assert ranks.end() == [0] * world_size, ranks.errors()
            else:
                enough = run / "checkpoints" / checkpoint.folder_name(STEPS * number // len(worlds) // EVERY * EVERY)
                ranks.wait(enough.is_dir, enough.name)
    return [step_records(run, number) for number in range(1, len(worlds) + 1)]


def test_rows_of_every_step_stay_the_same_from_four_ranks_to_two_to_three_to_four(prepared, tmp_path) -> None:
    undisturbed_run(tmp_path, prepared, 4)
    whole = step_records(tmp_path / "undisturbed-4")
    parts = attempts(copy_run(prepared, tmp_path / "run"), [4, 2, 3, 4])
    assert sorted({step for part in parts for step in part}) == list(range(1, STEPS + 1))
    for part in parts:
        assert part, "an attempt was killed before its first step"
        for step, record in part.items():
            assert sorted(record["rows"]) == sorted(whole[step]["rows"])
            assert record["loss"] == pytest.approx(whole[step]["loss"], rel=0.01)
    firsts = [min(part) for part in parts]
    assert firsts == sorted(firsts)
    assert firsts[-1] > 1
    for former, later in itertools.pairwise(parts):
        assert min(later) <= max(former) + 1, "steps were left out"


def test_asked_to_make_way_while_a_save_is_under_way_both_are_committed(prepared, two_ranks, tmp_path) -> None:
    run = copy_run(prepared, tmp_path / "run")
    first = run / "checkpoints" / checkpoint.folder_name(EVERY)
    with crew("train_rank", 2, run / "attempt_1", run, False, SLOW_S) as ranks:
        ranks.wait(lambda: list(run.glob(f"checkpoints/{first.name}.partial-*/*.safetensors")), "its first file")
        assert not first.exists()
        ranks.signal(STOP_SIGNAL)
        assert ranks.end() == [EXIT_STOPPED] * 2, ranks.errors()
    last = max(step_records(run))
    assert checkpoint.fault_of(first) is None
    assert checkpoint.newest_verified(run / "checkpoints").newest.step == last < STEPS
    assert not list(run.glob("checkpoints/*.partial-*"))
    with crew("train_rank", 2, run / "attempt_2", run, True) as ranks:
        assert ranks.end() == [0, 0], ranks.errors()
    assert min(step_records(run, 2)) == last + 1
    assert final_weights(run) == final_weights(two_ranks)


@pytest.mark.parametrize("killed", [(), (1,)])
def test_killed_while_a_save_is_under_way_it_is_as_if_it_had_not_begun(prepared, two_ranks, tmp_path, killed) -> None:
    run = copy_run(prepared, tmp_path / "run")
    second = checkpoint.folder_name(2 * EVERY)
    with crew("train_rank", 2, run / "attempt_1", run, False, SLOW_S) as ranks:
        ranks.wait(lambda: list(run.glob(f"checkpoints/{second}.partial-*/*.safetensors")), "its first file")
        ranks.kill(*killed)
    assert checkpoint.newest_verified(run / "checkpoints") == checkpoint.Choice(
        checkpoint.read(run / "checkpoints" / checkpoint.folder_name(EVERY)), ()
    )
    with crew("train_rank", 2, run / "attempt_2", run, True) as ranks:
        assert ranks.end() == [0, 0], ranks.errors()
    assert min(step_records(run, 2)) == EVERY + 1
    assert final_weights(run) == final_weights(two_ranks)
