"""What is left of a rank that ends badly."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import falcon_dist.__main__ as program
from falcon_dist import contract
from falcon_dist.contract import UnsoundError, UserError


@pytest.mark.parametrize(("fault", "code"), [(UserError("no"), 2), (UnsoundError("no"), 3), (ValueError("no"), 1)])
def test_the_exit_code_stands_where_the_disk_takes_no_more_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, code: int
) -> None:
    def fail(verb: str, words: list[str]) -> int:
        raise fault

    (tmp_path / f"{contract.RESULT_FILE}.partial").symlink_to("/dev/full")
    monkeypatch.setenv(contract.RANK_DIR, str(tmp_path))
    monkeypatch.setattr(program, "_run", fail)
    with io.TextIOWrapper(Path("/dev/full").open("wb", buffering=0), write_through=True) as full:
        monkeypatch.setattr("sys.stderr", full)
        assert program.main(["train"]) == code
