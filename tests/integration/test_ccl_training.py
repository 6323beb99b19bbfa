"""Training over ccl ends in the weights of training over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
from ccl_ranks import run_ranks

PROGRAMS = Path(__file__).parent / "ccl_programs"
PROGRAM = PROGRAMS / "training.py"


@pytest.mark.parametrize(("part", "ranks"), [("ddp", 2), ("ddp", 4), ("bf16-hook", 2), ("fsdp", 2)])
def test_weights_equal_those_of_gloo(part: str, ranks: int) -> None:
    """Bit for bit with two ranks; within 1e-5 with four, whose sums have an order."""
    for outcome in run_ranks(PROGRAM, part, ranks=ranks):
        assert outcome.code == 0, outcome.text
        assert "equal" in outcome.text
