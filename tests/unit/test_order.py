from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_dist.config import LoopConfig
from falcon_dist.contract import UserError
from falcon_dist.order import PADDING, permuted, plan_schedule


@given(size=st.integers(1, 400), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
def test_permuted_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    places = [permuted(i, size=size, seed=seed, epoch=epoch) for i in range(size)]
    assert sorted(places) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permuted(i, size=100, seed=s, epoch=e) for i in range(100)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_permutation_mixes() -> None:
    """Neighbours do not stay neighbours: the mean distance of a random permutation is a third of its size."""
    order = [permuted(i, size=10_000, seed=7, epoch=0) for i in range(10_000)]
    distance = sum(abs(a - b) for a, b in itertools.pairwise(order)) / 9_999
    assert 3_000 < distance < 3_700


def schedule(world_size: int, **loop: object):
    return plan_schedule(LoopConfig(**loop), num_rows=37, world_size=world_size, seed=3)


def test_every_row_once_an_epoch_and_padding_counted() -> None:
    plan = schedule(2, global_batch=8, epochs=2.0)
    rows = [row for step in range(plan.total_steps) for row in plan.rows_of_step(step)]
    assert plan.total_steps == 10
    assert rows.count(PADDING) == plan.padding_rows == 80 - 74
    assert all(rows.count(row) == 2 for row in range(37))
    assert plan.unseen_rows == 0


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_same_rows_a_step_for_any_world(micro_batch: int) -> None:
    plans = [schedule(w, global_batch=12, micro_batch=micro_batch, epochs=1.0) for w in (1, 2, 3, 6)]
    for step in range(plans[0].total_steps):
        whole = plans[0].rows_of_step(step)
        for plan in plans:
            shared = [plan.rows_of_rank(step, rank) for rank in range(plan.world_size)]
            assert sorted(itertools.chain(*shared)) == sorted(whole)
            assert {len(part) for part in shared} == {12 // plan.world_size}


def test_max_steps_counts_what_is_never_seen() -> None:
    plan = schedule(1, global_batch=4, max_steps=3)
    assert (plan.total_steps, plan.total_rows, plan.padding_rows, plan.unseen_rows) == (3, 12, 0, 25)


def test_epochs_that_binary_fractions_miss_make_no_step_of_their_own() -> None:
    loop = LoopConfig(epochs=2.2, global_batch=10)
    assert plan_schedule(loop, num_rows=50, world_size=1, seed=0).total_steps == 11


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ({"global_batch": 6}, 'loop.global_batch does not fit micro_batch 1 x 4 ranks: "6"'),
        ({"global_batch": 8, "grad_accum": 3}, "leave grad_accum out"),
        ({"micro_batch": 0}, 'loop.micro_batch must be at least 1: "0"'),
        ({"max_steps": 0}, 'loop.max_steps must be at least 1: "0"'),
        ({"epochs": 0.0}, 'loop.epochs must be above 0: "0.0"'),
    ],
)
def test_settings_that_do_not_fit(loop: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule(4, **loop)
