"""The whole series; the default suite has a slice of each (tests/integration/test_saves.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from saves.proofs import PHASES, flip_bits, kill_and_resume, kill_savers, make_run, undisturbed_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    return make_run(folder, folder / "run")


def test_500_kills_within_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = kill_savers(tmp_path, 500)
    with capsys.disabled():
        print(f"\n\n{ledger}")
    assert ledger.total == 500
    assert all(ledger.met(phase) for phase in PHASES), "a phase of the protocol was met by no kill"


def test_50_runs_killed_and_resumed(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = kill_and_resume(tmp_path, prepared, 50)
    with capsys.disabled():
        print(f"\n\n{ledger}")
    assert ledger.total >= 50
    assert all(ledger.met(phase) for phase in ("training", "saving", "training while a checkpoint is written"))


def test_200_flipped_bits_in_every_file(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed_run(tmp_path, prepared, 2)
    ledger = flip_bits(max((tmp_path / "undisturbed-2" / "checkpoints").glob("step-*")), 200)
    with capsys.disabled():
        print(f"\n\n{ledger}")
    assert ledger.total >= 200 * 10
