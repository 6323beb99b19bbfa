"""DeepSpeed's ZeRO over ccl: on one host, but beside the tests for which make test-cluster installs DeepSpeed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from integration.ccl_ranks import run_ranks

PROGRAMS = Path(__file__).parents[1] / "integration" / "ccl_programs"


@pytest.mark.parametrize("stage", [2, 3])
def test_losses_of_deepspeed_zero_equal_those_of_gloo(stage: int) -> None:
    found = {}
    for backend in ("ccl", "gloo"):
        ranks = run_ranks(PROGRAMS / "zero.py", backend, str(stage), ranks=2, DS_ACCELERATOR="cpu", LOCAL_SIZE="2")
        if backend == "ccl":  # a rank of the gloo reference sometimes aborts after its last line, in its teardown
            assert [rank.code for rank in ranks] == [0, 0], ranks[0].text
        told = [json.loads(re.findall("^losses (.*)$", rank.text, re.MULTILINE)[0]) for rank in ranks]
        assert [used for used, _ in told] == [backend] * 2
        found[backend] = [losses for _, losses in told]
    assert found["ccl"] == found["gloo"]
