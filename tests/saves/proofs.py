"""Kills within saves, runs that are killed and resumed, flipped bits: each any number of times, with a ledger."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from launching import write_inputs
from safetensors.torch import load_file

from falcon_dist import checkpoint, tensor_file, train_state
from falcon_dist.contract import EMERGENCY_SIGNAL, EXIT_FAILED, PEER_IS_GONE
from falcon_dist.settings import load
from saves.crew import Crew, crew, run_once, went_on_after
from saves.ledger import Ledger

SAVING_S = 0.5
"""Kills come within this after ranks began to save, in which they save several times."""
WEIGHTS = ("model", "train_state/optimizer")
STEPS, EVERY = 12, 2
MOMENT_S = 0.05
"""About what a save of these runs takes."""
MOST_TRIES = 10
"""Of a run that is over before anything was trained from a checkpoint."""
NOT_SAVED = "emergency checkpoint: failed"
PHASES = (
    "compared and copied",
    "folder made, no file yet",
    "files are written",
    "manifest written, not yet renamed",
    "renamed, not yet told",
    "an older one is removed",
    "between two saves",
)
"""Those of a save, as what is left of it tells them apart."""


def seeded() -> tuple[int, random.Random]:
    """The chances of a series; SAVES_SEED repeats one."""
    seed = int(os.environ.get("SAVES_SEED", random.randrange(1 << 30)))
    return seed, random.Random(seed)


def kill_savers(folder: Path, count: int) -> Ledger:
    """Ranks that save one checkpoint after the other, killed so many times; the next ones go on from what is left.

    Ranks that go on read the newest checkpoint and look whether every tensor in it is of the one step it says.
    """
    seed, chance = seeded()
    ledger = Ledger("killed while checkpoints were written in the background")
    root, committed = folder / "run" / "checkpoints", 0
    for number in range(count):
        world_size, name = chance.choice([1, 2, 2, 3]), f"seed {seed}, kill {number}"
        place = folder / f"crew-{number}"
        with crew("keep_saving", world_size, place, folder / "run", chance.randrange(1 << 30)) as ranks:
            ranks.wait(lambda ranks=ranks: all_train(ranks), "its first step")
            time.sleep(chance.uniform(0, SAVING_S))
            assert ranks.running(), f"{name}: ranks that save without end have ended"
            who = kill_some(ranks, chance)
        check_killed(ranks, name)
        assert went_on_after(committed) in ranks.told("line", "text"), f"{name}: it did not go on after {committed}"
        told = max([committed, *ranks.told("checkpoint", "step")])
        committed = newest_step(root, told, name)
        ledger.count(who, phase_of_save(root, ranks, committed > told))
        shutil.rmtree(place)
    ledger.fact("checkpoints committed in between", committed)
    ledger.fact("SAVES_SEED", seed)
    return ledger


def all_train(ranks: Crew) -> bool:
    """Whether each of them has found out where it goes on, and is past that."""
    return all("train" in ranks.told("phase", "name", rank) for rank in range(len(ranks.ranks)))


def newest_step(root: Path, told: int, name: str) -> int:
    """The step that the next attempt is to go on after: of the newest checkpoint, of which every byte verifies.

    Args:
        root: folder of checkpoints.
        told: the newest step that ranks have told as committed.
        name: of the run, for what is said of it.
    """
    choice = checkpoint.newest_verified(root, with_state=True)
    assert choice.refused == (), name
    step = choice.newest.step if choice.newest else 0
    assert step >= told, f"{name}: step {told} was told as committed, {step} is there"
    return step


def check_killed(ranks: Crew, name: str) -> None:
    """Nobody may have ended of itself, but for those that lost a peer that was killed before them."""
    codes = ranks.end()
    assert -signal.SIGKILL in codes, f"{name}: {codes}, nobody was killed"
    for number, code in enumerate(codes):
        said = ranks.errors(number)
        lost = code == EXIT_FAILED and any(sign in said for sign in PEER_IS_GONE) and NOT_SAVED not in said
        through = code == 0 and ranks.told("step", "step", number)[-1:] == [STEPS]
        assert code == -signal.SIGKILL or lost or through, f"{name}: {codes}, rank {number} failed\n{ranks.errors()}"


def kill_some(ranks: Crew, chance: random.Random) -> str:
    """Kills all ranks at once, or any one and, as a launcher would, the others a moment later; who was first."""
    if len(ranks.ranks) == 1 or chance.random() < 0.5:
        ranks.kill()
        return "all ranks" if len(ranks.ranks) > 1 else "the only rank"
    first = chance.randrange(len(ranks.ranks))
    ranks.kill(first)
    time.sleep(chance.uniform(0, 0.1))
    ranks.kill()
    return "rank 0 first" if first == 0 else "another rank first"


def phase_of_save(root: Path, ranks: Crew, committed_untold: bool) -> str:
    """Where the kill met the save, by what is left of it."""
    left = list(root.glob("*.partial-*"))
    if any(".partial-rotated-" in path.name for path in left):
        return "an older one is removed"
    if any((path / checkpoint.MANIFEST).exists() for path in left):
        return "manifest written, not yet renamed"
    if any(path.is_file() for folder in left for path in folder.rglob("*")):
        return "files are written"
    if left:
        return "folder made, no file yet"
    if committed_untold:
        return "renamed, not yet told"
    return "compared and copied" if ranks.told("phase", "name")[-1] == "save" else "between two saves"


def make_run(folder: Path, run: Path, **changes: object) -> Path:
    """A prepared run folder for a small real training; ``changes`` as in loop.global_batch of a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = write_inputs(folder, records=200)
    small = {"loop.max_steps": STEPS, "loop.global_batch": 12, "evaluate.base": "false", "evaluate.prompts": "[]"}
    small |= {"checkpoint.every": EVERY, "data.eval_share": 0.0}
    config = load(str(recipe), [f"{key}={value}" for key, value in (small | changes).items()])
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"train": dataclasses.asdict(config)}))
    run_once("prepare_run", folder / "prepare", run)
    return run


def copy_run(prepared: Path, run: Path) -> Path:
    """The same run, of which nothing is trained yet."""
    run.mkdir(parents=True)
    for name in ("config.json", "prepared.json"):
        shutil.copy(prepared / name, run)
    return run


def final_weights(run: Path) -> Mapping[str, str]:
    """sha256 of every tensor of weights and optimizer of the last step: a survivor divides them over other files."""
    last = run / "checkpoints" / checkpoint.folder_name(STEPS)
    assert checkpoint.fault_of(last) is None
    found = {}
    for file in (path for path in last.rglob("*.safetensors") if str(path.relative_to(last)).startswith(WEIGHTS)):
        for name, tensor in load_file(file).items():
            found[f"{file.parent.name} {name}"] = hashlib.sha256(tensor_file.bytes_of(tensor)).hexdigest()
    assert len(found) >= 60
    return found


class Usual(NamedTuple):
    """A run that nothing happens to."""

    world_size: int
    weights: Mapping[str, str]
    start_s: float
    train_s: float
    """From when it begins to train to its end."""


class Attempt(NamedTuple):
    """What became of one attempt of a run."""

    after: int
    """The step it went on after."""
    steps: int
    """How many it made."""
    killed: bool

    def __str__(self) -> str:
        return f"after {self.after} {'killed at' if self.killed else 'to'} {self.after + self.steps}"


def kill_and_resume(folder: Path, prepared: Path, count: int, worlds: tuple[int, ...] = (2, 1, 3)) -> Ledger:
    """Runs that are killed at any moment and resumed, each at least once from a checkpoint with steps left. Each
    attempt is to go on after the newest one, and the last weights are to be those of a run that nothing happened to."""
    seed, chance = seeded()
    ledger = Ledger("kills of runs that were resumed")
    usual: dict[int, Usual] = {}
    for number in range(count):
        world_size, name = worlds[number % len(worlds)], f"seed {seed}, run {number}"
        if world_size not in usual:
            usual[world_size] = undisturbed_run(folder, prepared, world_size)
        for more in reversed(range(MOST_TRIES)):
            run = copy_run(prepared, folder / f"run-{number}")
            attempts = killed_run(run, usual[world_size], chance, ledger, name)
            assert final_weights(run) == usual[world_size].weights, f"{name} of {world_size} ranks has other weights"
            shutil.rmtree(run)
            if any(attempt.after and attempt.steps for attempt in attempts):
                break
            assert more, f"{name}: {MOST_TRIES} times over, and never trained on from a checkpoint"
    ledger.fact("resumed to the weights of an undisturbed run", f"{count} of {count} runs, 1 to 3 ranks")
    ledger.fact("SAVES_SEED", seed)
    return ledger


def killed_run(run: Path, usual: Usual, chance: random.Random, ledger: Ledger, name: str) -> list[Attempt]:
    """All attempts of one run: killed one to three times, and until there is a checkpoint, then left."""
    world_size, wanted, told = usual.world_size, chance.randint(1, 3), 0
    attempts: list[Attempt] = []
    while not attempts or attempts[-1].killed:
        after, more, who = newest_step(run / "checkpoints", told, name), len(attempts) < wanted, None
        with crew("train_rank", world_size, run / f"attempt_{len(attempts) + 1}", run, bool(attempts)) as ranks:
            if after < STEPS and (more or not after):
                wait_for_some_moment(ranks, chance, usual, after, any_time=more)
                who = kill_unless_over(ranks, chance, name)
            codes = ranks.end()
            assert who or not any(codes), f"{name}: {codes}\n{ranks.errors()}"
        attempts.append(Attempt(after, steps_made(ranks, after, name), bool(who)))
        if who:
            ledger.count(who, phase_of_run(ranks, run))
        told = max([told, *(step for rank in range(world_size) for step in ranks.told("checkpoint", "step", rank))])
    last = attempts[-1]
    assert last.after + last.steps == STEPS, f"{name}: over after step {last.after + last.steps}"
    ledger.life(f"{name}, {world_size} ranks: {'; '.join(map(str, attempts))}")
    return attempts


def steps_made(ranks: Crew, after: int, name: str) -> int:
    """How many an attempt made: on every rank one after the other, from where its checkpoint ends."""
    told = [ranks.told("step", "step", rank) for rank in range(len(ranks.ranks))]
    for steps in told:
        whole = list(range(after + 1, after + 1 + len(steps)))
        assert steps == whole, f"{name}: the newest checkpoint was of step {after}, then came steps {steps}"
    return max(map(len, told))


def undisturbed_run(folder: Path, prepared: Path, world_size: int) -> Usual:
    """Weights and seconds of a run that nothing happens to."""
    run = copy_run(prepared, folder / f"undisturbed-{world_size}")
    began = time.monotonic()
    with crew("train_rank", world_size, run / "attempt_1", run, False) as ranks:
        ranks.wait(lambda: all_train(ranks), "its first step")
        trains = time.monotonic()
        assert ranks.end() == [0] * world_size, ranks.errors()
    return Usual(world_size, final_weights(run), trains - began, time.monotonic() - trains)


def wait_for_some_moment(ranks: Crew, chance: random.Random, usual: Usual, after: int, *, any_time: bool) -> None:
    """Just after any step or save of those that are left has begun, or any time; or the end, if that comes first."""
    kind = chance.choice(["step", "save", "time"] if any_time else ["step", "save"])
    if kind == "time":
        wanted = chance.uniform(0, usual.start_s + usual.train_s * (STEPS - after) / STEPS)
    else:
        wanted = chance.randint(1, STEPS - after if kind == "step" else STEPS // EVERY - after // EVERY)
    began = time.monotonic()
    so_far: Mapping[str, Callable[[], float]] = {
        "time": lambda: time.monotonic() - began,
        "step": lambda: len(ranks.told("step", "step")),
        "save": lambda: ranks.told("phase", "name").count("save"),
    }
    while so_far[kind]() < wanted and all(rank.exitcode is None for rank in ranks.ranks):
        time.sleep(0.002)
    if kind != "time":
        time.sleep(chance.uniform(0, MOMENT_S))


def kill_unless_over(ranks: Crew, chance: random.Random, name: str) -> str | None:
    """As ``kill_in_training``; None where all had ended well before anyone was killed."""
    if not ranks.running():
        return None
    who = kill_in_training(ranks, chance)
    if not any(ranks.end()):
        return None
    check_killed(ranks, name)
    return who


def kill_in_training(ranks: Crew, chance: random.Random) -> str:
    """As ``kill_some``; of those that live on one may be asked for the last finished step, as a launcher would."""
    if len(ranks.ranks) == 1 or chance.random() < 0.4:
        return kill_some(ranks, chance)
    first, asked = chance.sample(range(len(ranks.ranks)), 2)
    can_save = "save" in ranks.told("takes", "signal", asked)
    ranks.kill(first)
    if can_save and ranks.ranks[asked].exitcode is None:
        ranks.signal(EMERGENCY_SIGNAL, asked)
    time.sleep(chance.uniform(0, 0.3))
    ranks.kill()
    return "one first, another asked to save" if can_save else "one first"


def phase_of_run(ranks: Crew, run: Path) -> str:
    """What rank 0 was doing, beside a checkpoint's writing or not."""
    said = ranks.told("phase", "name")
    if not said:
        return "starting"
    steps = ranks.told("step", "step")
    if said[-1] == "train" and not steps:
        return "before its first step"
    if said[-1] == "train" and next(run.glob("checkpoints/*.partial-*"), None):
        return "training while a checkpoint is written"
    return {"train": "training", "save": "saving", "load": "loading"}.get(said[-1], said[-1])


def flip_bits(path: Path, each: int) -> Ledger:
    """One bit at so many random places of every file of a checkpoint; each is to be caught, with the file's name, by
    those who verify a checkpoint and by a run that is resumed, which hashes files of tensors as it reads them."""
    seed, chance = seeded()
    weights = {n: t for file in path.glob("model*.safetensors") for n, t in tensor_file.read(file)[0].items()}
    kept = train_state.Kept(weights=weights, optimizer={}, steps=0, describe=id)
    assert fault_on_resume(path, kept) is None
    ledger = Ledger("flipped bits, each caught and named by its file")
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        whole, name = file.read_bytes(), str(file.relative_to(path))
        for _ in range(each):
            data = bytearray(whole)
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            file.write_bytes(data)
            for fault in (checkpoint.fault_of(path), fault_on_resume(path, kept)):
                assert fault is not None, f"seed {seed}: a bit of {name} flipped and nothing was said"
                assert fault.startswith(f"{name} is "), f"seed {seed}: a bit of {name} flipped, but: {fault}"
            ledger.count(path.name, name)
        file.write_bytes(whole)
    assert checkpoint.fault_of(path) is None
    return ledger


def fault_on_resume(path: Path, kept: train_state.Kept) -> str | None:
    """What a resumed run says of a checkpoint."""
    if fault := checkpoint.fault_of(path, tensors=False):
        return fault
    try:
        train_state.load(path, kept)
    except checkpoint.DamagedError as error:
        return str(error)
    return None
