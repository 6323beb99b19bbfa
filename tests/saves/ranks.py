"""What a rank of these tests does. Imported once, by the process that all ranks are forked from."""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from tiny_models import falcon_7b, make_model, make_tokenizer

from falcon_dist import contract, resume, tensor_file
from falcon_dist.config import CheckpointConfig, LoopConfig, TrainConfig
from falcon_dist.emergency import Updates
from falcon_dist.metrics import Reporter
from falcon_dist.order import plan_schedule
from falcon_dist.prepare import Prepared, prepare
from falcon_dist.process_group import open_group
from falcon_dist.run import Run
from falcon_dist.saving import Saver
from falcon_dist.settings import read_config
from falcon_dist.strategy.choice import make_strategy
from falcon_dist.team import gather
from falcon_dist.train import train
from falcon_dist.train_state import Kept
from falcon_dist.world import World
from saves.crew import ERRORS, EVENTS, Seat, went_on_after

# A thread pool that was started here would be missing in every process that is forked.
torch.set_num_threads(1)
VALUES = 251
"""State after a step is the step, modulo this: whole numbers that bf16 holds exactly."""


def sit(seat: Seat, work: Callable[..., Any], args: tuple[Any, ...]) -> NoReturn:
    """The life of a forked rank, up to its exit code."""
    seat.folder.mkdir(parents=True, exist_ok=True)
    os.dup2(os.open(seat.folder / ERRORS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), sys.stderr.fileno())
    env = environment_of(seat)
    os.environ.update(env)  # accelerate looks there
    try:
        code = work(env, *args)
    except BaseException:  # noqa: BLE001 - whatever it was, it is told and ends this process, which was forked
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code or 0)


def environment_of(seat: Seat) -> Mapping[str, str]:
    """What a launcher would have given this rank; events go into a file, which is read when the rank is dead."""
    events = os.open(seat.folder / EVENTS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    store = {contract.STORE_FD: str(seat.listening.detach())} if seat.listening else {}
    return {
        contract.RANK: str(seat.rank),
        contract.LOCAL_RANK: str(seat.rank),
        contract.WORLD_SIZE: str(seat.world_size),
        contract.LOCAL_WORLD_SIZE: str(seat.world_size),
        contract.MASTER_ADDR: "127.0.0.1",
        contract.MASTER_PORT: str(seat.port),
        contract.BACKEND: "gloo",
        contract.RANK_DIR: str(seat.folder),
        contract.EVENT_FD: str(events),
        "OMP_NUM_THREADS": "1",  # else a rank that is alone has two: they wait for each other on a busy machine
        **store,
    }


def prepare_run(_: Mapping[str, str], folder: Path) -> None:
    """Model and rows of a run."""
    prepare(read_config(folder / "config.json"), folder, {})


def train_rank(env: Mapping[str, str], folder: Path, resumed: bool, fsync_s: float = 0.0, full: str = "") -> int:
    """One rank of real training; with ``fsync_s``, on a disk that takes so long for every file.

    With ``full`` there is no room for files of tensors whose path this is part of.
    """
    if full:
        write = tensor_file.write
        tensor_file.write = lambda path, *a: write(Path("/dev/full") if full in str(path) else path, *a)
    if fsync_s:
        real = os.fsync
        os.fsync = lambda descriptor: (time.sleep(fsync_s), real(descriptor))[1]
    done = train(read_config(folder / "config.json"), folder, resume=resumed, env=env).result
    return contract.EXIT_STOPPED if done.status == "stopped" else 0


def keep_saving(env: Mapping[str, str], root: Path, seed: int) -> None:
    """Goes on from the newest checkpoint and saves one after the other while the live state changes, without end."""
    world = World.from_env(env)
    chance = random.Random(seed)
    with open_group(world, env) as board:
        run = bare_run(world, env, root)
        team = gather(board, world, run.checkpoints)
        saver = bare_saver(run, team)
        start = go_on(run, team, saver)
        run.reporter.line(went_on_after(start))
        with run.reporter.phase("train"):
            for step in itertools.count(start + 1):
                fill(saver.optimizer, live(saver), step)
                saver.save(step)
                # Nothing is waited for: the copy is being written, and this is the next step's state.
                fill(saver.optimizer, live(saver), step + 1)
                time.sleep(chance.uniform(0, 0.02))


def bare_run(world: World, env: Mapping[str, str], root: Path) -> Run:
    """A run of which only saving is of interest: many small files, two checkpoints kept."""
    config = TrainConfig(checkpoint=CheckpointConfig(background="on", max_shard_size="60KB", keep_last=2))
    return Run(
        config=config,
        folder=root,
        world=world,
        prepared=Prepared(model="", rows="", parameters=0),
        store=SimpleNamespace(digest=b"rows", of_manifest=b"manifest"),
        schedule=plan_schedule(LoopConfig(max_steps=10**6), num_rows=9, world_size=1, seed=0),
        reporter=Reporter(world, env, None),
        strategy=make_strategy(config, world),
        identity={},
    )


def bare_saver(run: Run, team: Any) -> Saver:
    """A small Falcon with its optimizer, ready to be saved."""
    model = make_model(falcon_7b())
    optimizer = run.strategy.make_optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    updates = Updates(0, optimizer)
    optimizer.step()
    monitor = SimpleNamespace(best_step=None, points=())
    tokenizer = make_tokenizer()
    return Saver(
        run=run, team=team, model=model, tokenizer=tokenizer, optimizer=optimizer, monitor=monitor, updates=updates
    )


def go_on(run: Run, team: Any, saver: Saver) -> int:
    """What a resumed run does; the step it goes on from."""
    chosen = resume.resume_point(run, team)
    if chosen is None:
        return 0
    resume.restore(run, team, chosen, model=saver.model, tokenizer=saver.tokenizer, optimizer=saver.optimizer)
    kept = live(saver)
    wrong = [name for name, tensor in kept.tensors.items() if not bool((tensor == chosen.step % VALUES).all())]
    assert not wrong, f"{chosen.path}: {wrong} are of another step"
    assert saver.optimizer.steps == chosen.step
    return chosen.step


def live(saver: Saver) -> Kept:
    kept = saver.run.strategy.kept(saver.model, saver.tokenizer, saver.optimizer)
    assert kept is not None
    return kept


@torch.no_grad()
def fill(optimizer: Any, kept: Kept, step: int) -> None:
    """The state after a step."""
    optimizer.steps = step
    for tensor in kept.tensors.values():
        tensor.fill_(step % VALUES)
