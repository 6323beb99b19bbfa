"""Training over ccl ends in the weights of training over gloo."""

from __future__ import annotations

import json
import re
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


@pytest.mark.parametrize("stage", [2, 3])
def test_losses_of_deepspeed_zero_equal_those_of_gloo(stage: int) -> None:
    pytest.importorskip("deepspeed")
    found = {}
    for backend in ("ccl", "gloo"):
        ranks = run_ranks(PROGRAMS / "zero.py", backend, str(stage), ranks=2, DS_ACCELERATOR="cpu", LOCAL_SIZE="2")
        assert [rank.code for rank in ranks] == [0, 0], ranks[0].text
        told = [json.loads(re.findall("^losses (.*)$", rank.text, re.MULTILINE)[0]) for rank in ranks]
        assert [used for used, _ in told] == [backend] * 2
        found[backend] = [losses for _, losses in told]
    assert found["ccl"] == found["gloo"]
