"""What grows while a run trains: a full disk tears no line and ends no run."""

from __future__ import annotations

import errno
import resource
import signal
from io import FileIO
from pathlib import Path

import pytest

from falcon_dist import contract, lines
from falcon_dist.contract import UserError
from falcon_dist.measure import BASE_FILE, _keep
from falcon_dist.metrics import Reporter, StepRecord
from falcon_dist.monitor import EVALUATIONS_FILE, write_evaluation
from falcon_dist.world import World

RECORD = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "epoch": 0.1, "tokens": 8, "seconds": 1.0}


class Full:
    """A file on a disk that has room again when ``errno`` is taken away."""

    errno: int | None = errno.ENOSPC

    def __init__(self, file: FileIO) -> None:
        self.fileno, self._write = file.fileno, file.write

    def write(self, data: bytes) -> int:
        self._write(data[:3])
        if self.errno:
            raise OSError(self.errno, "told by the disk")
        return self._write(data[3:]) + 3


def step(reporter: Reporter, number: int) -> None:
    record = StepRecord(step=number, rows=[], parts={}, gemm_share=0.0, **RECORD)  # type: ignore[arg-type]
    reporter.step(record, total=9, eta_s=1.0, log=False)


def test_steps_go_on_while_the_disk_is_full_and_that_is_said_once(tmp_path: Path, capsys) -> None:
    reporter = Reporter(World(), {}, tmp_path)
    step(reporter, 1)
    assert reporter._steps is not None
    disk = Full(reporter._steps)
    reporter._steps = disk  # type: ignore[assignment]
    for number in (2, 3):
        step(reporter, number)
    disk.errno = None
    step(reporter, 4)
    told = (tmp_path / contract.STEPS_FILE).read_text().splitlines()
    assert [line[:10] for line in told] == ['{"step": 1', '{"step": 4']
    said = "steps.jsonl cannot be written: No space left on device; training goes on unrecorded\n"
    assert capsys.readouterr().out.count(said) == 1


def test_a_line_that_does_not_fit_whole_is_not_begun(tmp_path: Path) -> None:
    """The kernel writes as much as there is room for and tells how much that was."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, old[1]))
        with (tmp_path / "file").open("ab", buffering=0) as file:
            assert lines.append(file, "sixteen letters\n") is None
            assert lines.append(file, "sixteen letters\n") == "No space left on device"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "file").read_text() == "sixteen letters\n"


def test_an_evaluation_is_kept_or_it_is_said_why_not(tmp_path: Path) -> None:
    assert write_evaluation(tmp_path, 2, {"answers": {}}) is None
    assert (tmp_path / EVALUATIONS_FILE).read_text() == '{"step": 2, "answers": {}}\n'
    (tmp_path / EVALUATIONS_FILE).unlink()
    (tmp_path / EVALUATIONS_FILE).symlink_to("/dev/full")
    assert write_evaluation(tmp_path, 4, {}) == "No space left on device"


def test_a_disk_that_is_gone_is_another_matter(tmp_path: Path) -> None:
    with (tmp_path / "file").open("ab", buffering=0) as file:
        disk = Full(file)
        disk.errno = errno.EIO
        with pytest.raises(OSError, match="told by the disk"):
            lines.append(disk, "line\n")  # type: ignore[arg-type]


def test_what_was_measured_before_training_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    """Half of it would end every resume."""
    path = tmp_path / BASE_FILE
    path.with_name(f"{BASE_FILE}.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r'cannot write ".*base.json": No space left on device; make room'):
        _keep(path, "{}\n")
    assert not path.exists()
