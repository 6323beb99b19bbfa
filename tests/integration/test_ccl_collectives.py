"""Every collective of the ccl backend against gloo's result, all elements, in real processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from ccl_ranks import run_ranks

RANKS = Path(__file__).parent / "ccl_programs"


@pytest.mark.parametrize(
    ("part", "ranks"),
    [("reductions", 2), ("movement", 2), ("reductions", 4), ("movement", 4), ("groups", 2), ("groups", 4)],
)
def test_every_result_equals_gloo(part: str, ranks: int) -> None:
    outcomes = run_ranks(RANKS / "collectives.py", part, ranks=ranks)
    said = "\n".join(outcome.text for outcome in outcomes)  # who fails first is not always rank 0
    assert [outcome.code for outcome in outcomes] == [0] * ranks, said
    assert said.count("equal\n") == ranks, said


@pytest.mark.parametrize(("part", "ranks"), [("reductions", 3), ("groups", 2)])
def test_results_over_oneccl_alone_equal_gloo(part: str, ranks: int) -> None:
    """Without the memory that ranks of one host share, as between hosts."""
    for outcome in run_ranks(RANKS / "collectives.py", part, ranks=ranks, FALCON_CCL_SHARED_MEMORY="0"):
        assert outcome.code == 0, outcome.text
        assert "equal" in outcome.text


def test_ten_thousand_collectives_do_not_grow() -> None:
    for outcome in run_ranks(RANKS / "growth.py", ranks=2):
        assert outcome.code == 0, outcome.text


def test_a_group_of_one_needs_nobody() -> None:
    (outcome,) = run_ranks(RANKS / "collectives.py", "reductions", ranks=1)
    assert outcome.code == 0, outcome.text


@pytest.mark.parametrize("ending", ["destroy", "leave", "exit7"])
def test_ranks_leave_with_their_own_code(ending: str) -> None:
    for outcome in run_ranks(RANKS / "leaving.py", ending, ranks=2):
        assert outcome.code == (7 if ending == "exit7" else 0), outcome.text
        assert "terminate called" not in outcome.text
