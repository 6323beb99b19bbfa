"""How often to save: Daly's interval against a search for the least loss, and the line that a person gets."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_dist.interval import Saved, advice, best_interval_s


def lost_share(every_s: float, stall_s: float, failure_s: float) -> float:
    """Daly's complete model (2006, equation 20): time until the work is done over the work, less 1; no restart."""
    return failure_s * math.expm1((every_s + stall_s) / failure_s) / every_s - 1


@given(stall=st.floats(0.01, 60), failure=st.floats(600, 1e6))
def test_no_other_interval_loses_noticeably_less(stall: float, failure: float) -> None:
    best = best_interval_s(stall, failure)
    least = lost_share(best, stall, failure)
    for factor in (0.25, 0.5, 0.8, 1.25, 2, 4):
        assert lost_share(best * factor, stall, failure) >= least * 0.999


def test_a_dear_save_needs_longer_intervals_and_is_never_rarer_than_failures() -> None:
    assert best_interval_s(1, 3600) == pytest.approx(math.sqrt(2 * 3600), rel=0.02)  # Young's first order
    assert best_interval_s(4, 3600) == pytest.approx(2 * best_interval_s(1, 3600), rel=0.02)
    assert best_interval_s(7200, 3600) == 3600


def saves(every: int, stall_s: float, step_s: float, count: int = 3) -> list[Saved]:
    found, now = [], 0.0
    for number in range(1, count + 1):
        now += every * step_s
        found.append(Saved(step=number * every, began_s=now, ended_s=now + stall_s * (5 if number == 1 else 1)))
        now = found[-1].ended_s
    return found


def test_advice_is_the_price_and_the_interval_that_pays() -> None:
    assert advice(saves(50, 0.5, 1.0), 24) == (
        "saving every 50 steps costs 0.99% of the time (0.5 s for each, 1 s for a step); for one failure in "
        "24 hours the least is lost with checkpoint.every=290 (Young/Daly)"
    )
    assert "in 0.5 hours the least is lost with checkpoint.every=42 " in str(advice(saves(50, 0.5, 1.0), 0.5))
    assert "checkpoint.every=1 " in str(advice(saves(1, 0.001, 900.0), 24))


def test_one_save_tells_nothing() -> None:
    assert advice([], 24) is None
    assert advice(saves(5, 0.1, 1.0, count=1), 24) is None
