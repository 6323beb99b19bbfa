"""Exact resume where sums have an order, and replicas that must stay equal."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import ALONE, environment, launch, step_records, weights_digest, write_inputs

from falcon_dist import checkpoint
from falcon_dist.contract import EMERGENCY_SIGNAL, EXIT_FAILED

LAST = "step-000008"
TRAIN = ("-m", "falcon_dist", "train")


def train(
    run: Path, world: int, *flags: str, attempt: int = 1, program: Sequence[str] = TRAIN
) -> list[tuple[int, str]]:
    """Runs ranks to their end; exit code and errors of each."""
    ranks = started(run, world, *flags, attempt=attempt, program=program)
    return [(rank.wait(200), rank.communicate()[1]) for rank in ranks]


def started(
    run: Path, world: int, *flags: str, attempt: int = 1, program: Sequence[str] = TRAIN
) -> list[subprocess.Popen[str]]:
    """Starts ranks as torchrun would, more than this machine may have cores for."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(world):
        folder = run / f"attempt_{attempt}" / f"rank_{rank:04d}"
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
        env = {**environment(), **common, **own, "FALCON_RANK_DIR": str(folder)}
        words = [sys.executable, *program, "--config", str(run / "config.json"), *flags]
        ranks.append(subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    return ranks


def forget_after(step: int, run: Path) -> None:
    """The run as it is when it was killed after this step was saved."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that ranks can start from, and what one rank did with it."""
    folder = tmp_path_factory.mktemp("one")
    settings = ("--set", "loop.global_batch=12", "--set", "evaluate.base=false")
    recipe = str(write_inputs(folder, records=200))
    done = launch(folder, *ALONE, "--recipe", recipe, "--run-id", "r", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "r"


def begin(prepared: Path, run: Path) -> Path:
    run.mkdir()
    for name in ("config.json", "prepared.json"):
        shutil.copy(prepared / name, run)
    return run


def test_three_ranks_resume_bit_for_bit(prepared: Path, tmp_path: Path) -> None:
    """Three numbers have more than one sum: the order must be that of a run that was never stopped."""
    whole = begin(prepared, tmp_path / "whole")
    assert [code for code, _ in train(whole, 3)] == [0, 0, 0]
    run = tmp_path / "resumed"
    shutil.copytree(whole, run)
    forget_after(4, run)
    assert [code for code, _ in train(run, 3, "--resume", attempt=2)] == [0, 0, 0]
    assert min(step_records(run, attempt=2)) == 5
    assert weights_digest(run / "checkpoints" / LAST) == weights_digest(whole / "checkpoints" / LAST)


FLIP = """
import os, sys, torch
from falcon_dist.loop import StepCallback
from falcon_dist.__main__ import main

begin = StepCallback.on_step_begin
def with_a_flipped_bit(self, args, state, control, **kwargs):
    if os.environ["RANK"] == "1" and state.global_step == 2:
        # A weight is written anew from its master by the next update, and a low bit of a moment may be rounded away.
        first = next(iter(kwargs["optimizer"].optimizer.state.values()))
        first["master"].view(-1).view(torch.uint8)[2] ^= 0x40
    return begin(self, args, state, control, **kwargs)
StepCallback.on_step_begin = with_a_flipped_bit
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(("world", "named"), [(2, "rank 0 (host"), (3, "rank 1 (host")])
def test_a_bit_that_flips_in_one_rank_ends_the_run(prepared: Path, tmp_path: Path, world: int, named: str) -> None:
    run = begin(prepared, tmp_path / "r")
    (tmp_path / "flip.py").write_text(FLIP)
    for code, err in train(run, world, program=[str(tmp_path / "flip.py")]):
        assert code == 3, err
        assert "replicas: after step 4" in err
        assert named in err
    kept = [path.name for path in (run / "checkpoints").glob("step-*")]
    assert kept == ["step-000002"], "a state that differs was kept"


DIES_WITH_ITS_WORK_DONE = """
import os, signal, sys
from falcon_dist.saving import Saver
from falcon_dist.__main__ import main

finish = Saver.finish
def dies(self):
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return finish(self)
Saver.finish = dies
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_who_waits_for_the_last_save_of_a_rank_that_died_still_saves_the_last_step(prepared: Path, tmp_path: Path):
    run = begin(prepared, tmp_path / "r")
    (tmp_path / "dies.py").write_text(DIES_WITH_ITS_WORK_DONE)
    dead, left = started(run, 2, program=[str(tmp_path / "dies.py")])
    assert dead.wait(200) == -signal.SIGKILL
    time.sleep(2)
    assert left.poll() is None, left.communicate()[1]
    left.send_signal(EMERGENCY_SIGNAL)  # what the launcher does
    assert left.wait(60) == EXIT_FAILED, left.communicate()[1]
    assert checkpoint.fault_of(run / "checkpoints" / LAST) is None
    assert checkpoint.holds_state(run / "checkpoints" / LAST)
