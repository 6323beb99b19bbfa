"""Checkpoints that several ranks write together in the background; the ranks are threads here."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore

from falcon_dist import background, checkpoint, tensor_file, train_state
from falcon_dist.background import Copies, Job, Writer
from falcon_dist.team import SaveError, Team, gather
from falcon_dist.train_state import Kept
from falcon_dist.world import World

NAMES = [f"layer{n}" for n in range(6)]


def state() -> Kept:
    return Kept(
        weights={name: torch.randn(8, 4).to(torch.bfloat16) for name in NAMES},
        optimizer={f"exp_avg/{name}": torch.randn(8, 4) for name in NAMES},
        steps=3,
        describe=lambda folder: (folder / "config.json").write_text("{}"),
    )


class Ranks:
    """Threads that save like ranks."""

    def __init__(self, root: Path, count: int) -> None:
        board = HashStore()
        self.root = root
        self.teams = [Team(board=board, rank=rank, writers=tuple(range(count))) for rank in range(count)]
        self.writers = [Writer(team) for team in self.teams]
        self.heard: list[str | None] = []

    def save(self, kept: Kept, step: int) -> list[str | None]:
        shards = kept.shards(writers=len(self.teams), max_bytes=100)
        for rank, writer in enumerate(self.writers):
            mine = tuple(shard for shard in shards if shard.writer == rank)
            job = Job(
                root=self.root,
                step=step,
                total_bytes=sum(tensor.nbytes for tensor in kept.tensors.values()),
                shards=mine,
                tensors=kept.tensors,
                write_rest=lambda folder: train_state.write_rest(folder, kept, shards),
                facts={"run_id": "r"},
            )
            writer.begin(job, self.heard.append)
        return [writer.finish(30) for writer in self.writers]


@pytest.mark.parametrize("name", ["/etc", "../step-000007", "step-000007.partial-1/..", "step-000008.partial-1"])
def test_nobody_is_led_out_of_the_folder_of_this_save(tmp_path: Path, name: str) -> None:
    """Whoever reaches the rendezvous store can write there."""
    kept, board = state(), HashStore()
    Team(board=board, rank=0, writers=(0, 1)).tell("7", "folder", name)
    (shard, *_) = kept.shards(writers=1, max_bytes=100)
    root = tmp_path / "runs"
    job = Job(
        root=root, step=7, total_bytes=1, shards=(shard,), tensors=kept.tensors, write_rest=lambda _: None, facts={}
    )
    with pytest.raises(SaveError, match=f'"{name}" is no folder for the save of step 7'):
        background._contribute(job, Team(board=board, rank=1, writers=(0, 1)))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_parts_of_all_ranks_become_one_checkpoint(tmp_path: Path, count: int) -> None:
    kept = state()
    assert Ranks(tmp_path, count).save(kept, 7) == [None] * count
    path = tmp_path / "step-000007"
    assert checkpoint.fault_of(path) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step-000007"]
    weights = {k: v for file in path.glob("model-*.safetensors") for k, v in load_file(file).items()}
    assert {*weights} == {*NAMES}
    for name, tensor in weights.items():
        assert torch.equal(tensor, kept.weights[name])
    target = Kept(weights={n: torch.zeros_like(w) for n, w in kept.weights.items()}, optimizer={}, steps=0, describe=id)
    optimizer, steps = train_state.load(path, target)
    assert steps == 3
    for name, tensor in kept.optimizer.items():
        assert torch.equal(optimizer[name], tensor)


def test_a_writer_without_a_file_of_its_own_holds_nobody_up(tmp_path: Path) -> None:
    """Adapters alone are one file; and one tensor can be larger than what falls to several ranks."""
    adapters = Kept(weights={"a": torch.ones(4)}, optimizer={}, steps=1, describe=id, in_one_file=True)
    ranks = Ranks(tmp_path, 3)
    assert ranks.save(adapters, 1) == [None] * 3
    whole = Kept(weights={"a": torch.ones(4), "b": torch.ones(999)}, optimizer={}, steps=1, describe=id)
    assert {shard.writer for shard in whole.shards(writers=3, max_bytes=100)} < {0, 1, 2}
    assert ranks.save(whole, 2) == [None] * 3
    assert checkpoint.newest_verified(tmp_path).newest.step == 2


@contextmanager
def failing_write(monkeypatch: pytest.MonkeyPatch, shard: str) -> Iterator[None]:
    """A full disk where one file is written: the real write, into /dev/full."""
    real = tensor_file.write

    def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> tensor_file.Told:
        return real(Path("/dev/full") if shard in path.name else path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(tensor_file, "write", write)
        yield


@pytest.mark.parametrize(("shard", "words"), [("model-00001", ""), ("model-00006", "rank 1: ")])
def test_a_full_disk_of_any_rank_is_known_to_all_and_the_next_save_works(tmp_path, monkeypatch, shard, words) -> None:
    ranks = Ranks(tmp_path, 2)
    assert ranks.save(state(), 1) == [None, None]
    with failing_write(monkeypatch, shard):
        assert ranks.save(state(), 2) == [f"{words}No space left on device"] * 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.fault_of(tmp_path / "step-000001") is None
    assert ranks.save(state(), 3) == [None, None]
    assert checkpoint.newest_verified(tmp_path).newest.step == 3


def test_where_too_little_is_free_nothing_is_written_and_the_next_save_works(tmp_path, monkeypatch) -> None:
    ranks, kept = Ranks(tmp_path, 2), state()
    assert ranks.save(kept, 1) == [None, None]
    needed = sum(tensor.nbytes for tensor in kept.tensors.values())
    written: list[Path] = []
    full = os.statvfs_result((512, 1, 1 << 30, 0, needed - 1, 0, 0, 0, 0, 255))
    with monkeypatch.context() as patched:
        patched.setattr(os, "statvfs", lambda folder: full)
        patched.setattr(tensor_file, "write", lambda path, tensors: written.append(path))
        assert ranks.save(kept, 2) == ["No space left on device: 0.0 MB needed, 0.0 MB free"] * 2
    assert written == []
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert ranks.save(kept, 3) == [None, None]


def test_a_folder_that_has_gone_is_made_again_and_one_that_cannot_be_is_told(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    root.parent.mkdir()
    ranks = Ranks(root, 2)
    assert ranks.save(state(), 1) == [None, None]
    root.rename(tmp_path / "gone")
    assert ranks.save(state(), 2) == [None, None]
    root.rename(tmp_path / "gone-too")
    root.write_text("")
    assert ranks.save(state(), 3) == ["Not a directory"] * 2
    root.parent.rename(tmp_path / "unmounted")
    assert ranks.save(state(), 4) == ["No such file or directory"] * 2
    assert not root.parent.exists()


def test_what_is_copied_no_longer_changes() -> None:
    live = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2, 2)}
    copies = Copies()
    first = copies.take(live)
    live["a"] += 1
    assert first["a"].tolist() == [1, 1, 1]
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    again = copies.take(live)
    assert again["a"].tolist() == [2, 2, 2]
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == places


def test_a_save_that_never_ends_is_told(tmp_path: Path) -> None:
    board = HashStore()
    writer = Writer(Team(board=board, rank=1, writers=(0, 1)))  # rank 0 never says anything
    kept = state()
    job = Job(
        root=tmp_path,
        step=1,
        total_bytes=0,
        shards=kept.shards(writers=1, max_bytes=999),
        tensors=kept.tensors,
        write_rest=id,
        facts={},
    )
    writer.begin(job, id)
    with pytest.raises(RuntimeError, match=r"not written after 0.1 s; the storage does not answer"):
        writer.finish(0.1)
    board.set("save/1/done", '{"fault": "the end"}')


def test_ranks_that_do_not_see_the_folder_do_not_write(tmp_path: Path, monkeypatch) -> None:
    from falcon_dist import team

    monkeypatch.setattr(team, "SEEN_S", 0.2)
    board, found = HashStore(), {}
    roots = {0: tmp_path / "shared", 1: tmp_path / "shared", 2: tmp_path / "elsewhere"}

    def find(rank: int) -> None:
        found[rank] = gather(board, World(rank=rank, world_size=3, local_rank=0, local_world_size=1), roots[rank])

    threads = [threading.Thread(target=find, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert {rank: team.writers for rank, team in found.items()} == {0: (0, 1), 1: (0, 1), 2: (0, 1)}
    assert not list((tmp_path / "shared").iterdir())
    assert background.NICE > 0
