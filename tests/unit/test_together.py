"""Checkpoints of a divided state: whatever rank 0's disk does, all ranks take part in the same gathers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHAPES, make_model, make_tokenizer
from torch.distributed import HashStore

from falcon_dist import checkpoint, tensor_file, together
from falcon_dist.config import CheckpointConfig, TrainConfig
from falcon_dist.engine.adamw import decayed_groups
from falcon_dist.strategy import zero
from falcon_dist.strategy.partitions import PartitionedAdamW
from falcon_dist.team import Team
from falcon_dist.world import World

WAIT_S = 20.0


class Ranks:
    """Three ranks as threads, each with the state of a small model; a gather returns when all have asked for it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.teams = [Team(board=board, rank=rank, writers=(0, 1, 2)) for board in [HashStore()] for rank in range(3)]
        self.gathered: list[list[str]] = []
        self._meeting = threading.Barrier(3)
        model = make_model(SHAPES["llama"]())
        optimizer = PartitionedAdamW(decayed_groups(model.named_parameters(), 0.0), lr=1e-3)
        self._state = (model, make_tokenizer(), optimizer)
        config = TrainConfig(strategy="zero1", checkpoint=CheckpointConfig(max_shard_size="100KB"))
        self.strategy = zero.Zero1(config, World())
        self.strategy.ready(model)
        monkeypatch.setattr(zero, "whole", self._gather)

    def _gather(self, live: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
        self.gathered[int(threading.current_thread().name)].append(key)
        self._meeting.wait(WAIT_S)
        return live[key.removeprefix("train_state/").rpartition("/")[2]]

    def save(self, step: int) -> list[str | None]:
        told: dict[int, str | None] = {}
        self.gathered = [[], [], []]
        threads = [threading.Thread(target=self._one, args=(n, step, told), name=str(n)) for n in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert self.gathered[0] == self.gathered[1] == self.gathered[2]
        return [told[rank] for rank in range(3)]

    def _one(self, rank: int, step: int, told: dict[int, str | None]) -> None:
        told[rank] = together.save(
            self.teams[rank],
            self.root / checkpoint.folder_name(step),
            {"step": step},
            total_bytes=self.strategy.saved_bytes(*self._state),
            give=lambda folder: self.strategy.save(folder, *self._state, meet=lambda: self.teams[rank].meet(3)),
        )


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    return Ranks(tmp_path / "checkpoints", monkeypatch)


def full(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stats = os.statvfs_result((512, 1, 1 << 30, 0, 9, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda folder: stats)


def fills_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tensor_file.write

    def write(path: Path, *args: Any) -> tensor_file.Told:
        return real(Path("/dev/full") if "00002" in path.name else path, *args)

    monkeypatch.setattr(tensor_file, "write", write)


def fills_up_at_the_tokenizer(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_rest(*args: object) -> None:
        raise Exception("No space left on device (os error 28)")  # noqa: TRY002 - the very words of tokenizers

    monkeypatch.setattr(zero.train_state, "write_rest", write_rest)


def gone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.rename(root.with_name("aside"))
    root.write_text("")


@pytest.mark.parametrize(
    ("fault", "words", "gathers"),
    [
        (full, "No space left on device: 1.7 MB needed, 0.0 MB free", False),
        (gone, "Not a directory", False),
        (fills_up, "No space left on device", True),
        (fills_up_at_the_tokenizer, "No space left on device (os error 28)", True),
    ],
)
def test_what_rank_0_cannot_write_is_known_to_all_and_the_next_save_works(
    ranks: Ranks, monkeypatch, fault: Callable[[Path, pytest.MonkeyPatch], None], words: str, gathers: bool
) -> None:
    assert ranks.save(1) == [None] * 3
    everything = ranks.gathered[0]
    assert len(everything) == len({*everything}) > 30
    with monkeypatch.context() as patched:
        fault(ranks.root, patched)
        assert ranks.save(2) == [words] * 3
    assert ranks.gathered[0] == (everything if gathers else [])
    if fault is gone:
        ranks.root.unlink()
    else:
        assert [path.name for path in ranks.root.iterdir()] == ["step-000001"]
    assert ranks.save(3) == [None] * 3
    assert checkpoint.newest_verified(ranks.root).newest.step == 3


def test_no_rank_is_in_a_gather_while_rank_0_writes_to_the_disk(ranks: Ranks, monkeypatch) -> None:
    """A gather ends at its time limit, a slow disk does not."""
    shards = ranks.strategy._described(*ranks._state).shards(writers=1, max_bytes=100_000)
    before = {name: number for number, shard in enumerate(shards) for name in shard.tensors}
    real, gather, written, early = tensor_file.write, zero.whole, [], []

    def write(path: Path, *args: Any) -> tensor_file.Told:
        told = real(path, *args)
        time.sleep(0.05)
        written.append(path.name)
        return told

    def watched(live: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
        if len(written) < before[key]:
            early.append(key)
        return gather(live, key)

    monkeypatch.setattr(tensor_file, "write", write)
    monkeypatch.setattr(zero, "whole", watched)
    assert ranks.save(1) == [None] * 3
    assert len(written) == len(shards) > 5
    assert early == []
