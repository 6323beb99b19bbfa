"""What a saver of one rank does and tells where a save, or what follows one, goes wrong."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import cast

import pytest
from saves.ranks import bare_run, bare_saver
from torch.distributed import HashStore

from falcon_dist import checkpoint, keeping, resume, tensor_file
from falcon_dist.config import CheckpointConfig, Switch
from falcon_dist.contract import UserError
from falcon_dist.monitor import Point
from falcon_dist.saving import Saver
from falcon_dist.strategy.choice import make_strategy
from falcon_dist.team import Team
from falcon_dist.world import World


def saver_of(root: Path, rules: CheckpointConfig, world_size: int = 1) -> Saver:
    run = bare_run(World(), {}, root)
    config = dataclasses.replace(run.config, checkpoint=rules)
    run = dataclasses.replace(run, config=config, strategy=make_strategy(config, World()))
    run = dataclasses.replace(run, world=World(world_size=world_size))
    return bare_saver(run, Team(board=HashStore(), rank=0, writers=(0,)))


def test_links_that_cannot_be_made_are_told_and_the_checkpoint_counts(tmp_path: Path, capsys) -> None:
    """The Trainer of an older run left a folder where the link is to be."""
    links = tmp_path / "results"
    (links / "checkpoint-4").mkdir(parents=True)
    saver = saver_of(tmp_path, CheckpointConfig(keep_last=1, links=str(links)))
    for step in (2, 4):
        saver.save(step)
        saver.finish()
    said = capsys.readouterr().out
    newest = saver.run.checkpoints / "step-000004"
    assert f"checkpoint {newest}\n" in said
    assert checkpoint.fault_of(newest) is None
    assert "checkpoint of step 4 is whole, but links and rotation after it failed: checkpoint.links: " in said
    assert 'checkpoint-4" is in the way and no link; move it; older checkpoints are left' in said
    assert keeping.committed_steps(saver.run.checkpoints) == [2, 4]
    saver.save(6)
    saver.finish()
    assert keeping.committed_steps(saver.run.checkpoints) == [6]
    assert (links / "checkpoint-6").resolve().name == "step-000006"


def test_a_folder_of_links_that_cannot_be_made_is_told_too(tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    saver = saver_of(tmp_path, CheckpointConfig(links=str(tmp_path / "file" / "results")))
    saver.save(2)
    saver.finish()
    assert "links and rotation after it failed: [Errno 20] Not a directory" in capsys.readouterr().out


def test_a_resumed_step_that_turns_out_to_be_the_best_is_kept_as_such(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, CheckpointConfig(keep_last=1, keep_best=True))
    saver.monitor.points = (Point(2, 3.0),)
    for step in (2, 4):  # that of step 4 as a survivor saves it: nothing is known of it yet
        saver.save(step)
        saver.finish()
    assert keeping.committed_steps(saver.run.checkpoints) == [2, 4]
    saver.monitor.points = (Point(2, 3.0), Point(4, 2.0))
    saver.keep(4)
    assert (saver.run.checkpoints / "best").resolve().name == "step-000004"
    assert keeping.committed_steps(saver.run.checkpoints) == [4]


@pytest.mark.parametrize("background", ["on", "off"])
def test_the_last_save_that_fails_ends_the_run_and_one_before_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    saver = saver_of(tmp_path, CheckpointConfig(background=cast("Switch", background)))
    write = tensor_file.write
    for full in (True, False, True):
        place = (lambda path, *a: write(Path("/dev/full"), *a)) if full else write
        monkeypatch.setattr(tensor_file, "write", place)
        saver.save(2)
        if not full:
            saver.finish()
    with pytest.raises(UserError, match=r"cannot write in .*No space left on device; .* go on with --resume"):
        saver.finish()
    assert keeping.committed_steps(saver.run.checkpoints) == [2]


def test_what_a_run_can_go_on_from_outlives_newer_ones_that_it_cannot(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, CheckpointConfig(background="off", optimizer=False, keep_last=1))
    saver.save(6, makes_way=True)
    saver.run.strategy.keeps_state = False
    for step in (8, 10):
        saver.save(step)
    assert keeping.committed_steps(saver.run.checkpoints) == [6, 10]
    newest = resume._choice(saver.run, None).newest
    assert newest is not None
    assert newest.step == 6


def test_no_rank_ends_before_all_have_heard_how_the_last_save_ended(tmp_path: Path) -> None:
    """With rank 0 goes the store that the others ask."""
    saver = saver_of(tmp_path, CheckpointConfig(background="on"), world_size=2)
    ending = threading.Thread(target=saver.finish, daemon=True)
    ending.start()
    ending.join(0.5)
    assert ending.is_alive()
    dataclasses.replace(saver.team, rank=1).meet(2)
    ending.join(10)
    assert not ending.is_alive()


def test_ranks_write_beside_training_where_all_have_the_memory(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, CheckpointConfig(background="auto"), world_size=2)
    for other, agreed in (("yes", True), ("no", False)):
        saver.team.board.set("save/background/1", json.dumps(other))
        assert saver._agreed_on_background(1) == agreed


@pytest.mark.parametrize("background", ["on", "off"])
def test_a_run_that_makes_way_keeps_what_it_takes_to_go_on(tmp_path: Path, background: str) -> None:
    """Also one that keeps no optimizer's state otherwise."""
    saver = saver_of(tmp_path, CheckpointConfig(background=cast("Switch", background), optimizer=False))
    for step, makes_way in ((2, False), (4, True)):
        saver.save(step, makes_way)
        saver.finish()
        path = saver.run.checkpoints / checkpoint.folder_name(step)
        assert checkpoint.fault_of(path) is None
        assert checkpoint.holds_state(path) == makes_way
    saver.run.strategy.load(path, saver.model, saver.tokenizer, saver.optimizer)


@pytest.mark.parametrize("saved", [False, True])
def test_so_does_a_survivor_also_where_the_step_was_saved_without(tmp_path: Path, saved: bool) -> None:
    saver = saver_of(tmp_path, CheckpointConfig(optimizer=False))
    if saved:
        saver.save(1)
        saver.finish()
        assert not checkpoint.holds_state(saver.run.checkpoints / "step-000001")
    path, step = saver.save_last_finished()
    assert (path.name, step) == ("step-000001", 1)
    assert checkpoint.fault_of(path) is None
    assert checkpoint.holds_state(path)
    saver.run.strategy.load(path, saver.model, saver.tokenizer, saver.optimizer)
    kept = path.stat().st_ino
    assert saver.save_last_finished() == (path, 1)
    assert path.stat().st_ino == kept


def test_a_step_that_was_refused_counts_again_once_it_is_saved_anew(tmp_path: Path) -> None:
    saver = saver_of(tmp_path, CheckpointConfig(background="off", keep_last=1))
    for step in (2, 4):
        saver.save(step)
    saver.refused = frozenset({4, 5})
    for step in (4, 6):
        saver.save(step)
    assert keeping.committed_steps(saver.run.checkpoints) == [6]


def test_every_rank_knows_that_a_refused_step_was_saved_anew(tmp_path: Path) -> None:
    """Asked for it in an emergency, it would put the new one aside."""
    saver = saver_of(tmp_path, CheckpointConfig())
    saver.team = dataclasses.replace(saver.team, rank=1, writers=(0, 1))
    saver.refused = frozenset({4, 6})
    saver._settle(4, (), None)
    saver._settle(6, (), "No space left on device")
    assert saver.refused == {6}
