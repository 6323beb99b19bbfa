"""A store on disk: whole before it has its name, and what is said where it is not or cannot be written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from falcon_dist.contract import UserError
from falcon_dist.dataset import Skipped
from falcon_dist.packing import Row
from falcon_dist.records import Fault
from falcon_dist.rows import PackedStore, Parts, check_whole, damaged_file, write_store

ROW = Row(tokens=np.arange(4, dtype=np.int32), records=np.zeros(4, np.int32), mask=np.ones(4, np.uint8))
CANNOT_WRITE = r'packed rows: cannot write in "{}": {}; make room there, or set \$XDG_CACHE_HOME to a folder on another'


def fill(parts: Parts) -> Mapping[str, Any]:
    (parts["train"].folder.parent / "skipped.jsonl").write_text("{}\n")
    parts["train"].write([ROW])
    return {"max_length": 4}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", fill)
    return tmp_path / "store"


def test_all_of_a_store_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[str, int] = {}
    real = os.fsync

    def fsync(descriptor: int) -> None:
        assert not (tmp_path / "store").exists()
        place = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced[str(place.relative_to(tmp_path)).partition("/")[2]] = place.stat().st_size
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_store(tmp_path / "store", fill)
    sizes = {str(path.relative_to(tmp_path / "store")): path.stat().st_size for path in tmp_path.glob("store/**/*")}
    assert {"manifest.json", "skipped.jsonl", "train", "eval", "train/tokens.bin"} < set(sizes)
    assert {**sizes, "": synced[""]} == synced


@pytest.mark.parametrize("torn", ["", '{"facts": {"max_', "\0" * 64, "[]", '{"files": 3}', '{"files": {"a": 1}}'])
def test_a_manifest_that_is_torn_is_told_not_raised(store: Path, torn: str) -> None:
    assert damaged_file(store) is None
    (store / "train/tokens.bin").write_bytes(b"")
    assert damaged_file(store) == "train/tokens.bin"
    (store / "a").touch()
    (store / "manifest.json").write_text(torn)
    assert damaged_file(store) == "manifest.json"
    with pytest.raises(UserError, match=rf'^packed rows: "{store}/manifest.json" is damaged; delete "{store}" and '):
        PackedStore.open(store)


def test_a_manifest_that_tells_too_little_is_damaged(store: Path) -> None:
    (store / "manifest.json").write_text(json.dumps({"facts": {}, "files": {}}))
    with pytest.raises(UserError, match=r'manifest.json" is damaged'):
        PackedStore.open(store)


@pytest.mark.parametrize("buffering", [0, -1])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, buffering: int) -> None:
    """Told as a row is written or, where that fits the buffer, as its file is closed."""

    def fill_disk(parts: Parts) -> Mapping[str, Any]:
        files = parts["train"]._files
        files.pop("tokens").close()
        files["tokens"] = Path("/dev/full").open("wb", buffering=buffering)  # noqa: SIM115 - its writer closes it
        return fill(parts)

    with pytest.raises(UserError, match=CANNOT_WRITE.format(tmp_path, os.strerror(errno.ENOSPC))):
        write_store(tmp_path / "store", fill_disk)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_at_the_end_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=CANNOT_WRITE.format(tmp_path, os.strerror(errno.EIO))):
        write_store(tmp_path / "store", fill)
    assert not list(tmp_path.iterdir())


def test_records_left_out_that_cannot_be_written_down_are_one_line(tmp_path: Path) -> None:
    skipped = Skipped(tmp_path / "partial" / "skipped.jsonl", stop=False)
    with pytest.raises(UserError, match=CANNOT_WRITE.format(tmp_path, os.strerror(errno.ENOENT))):
        skipped.add(Fault("d.jsonl:1", "not a JSON object"))


def test_what_fails_while_the_data_is_read_is_not_the_cache(tmp_path: Path) -> None:
    def reading(_: Parts) -> Mapping[str, Any]:
        raise ConnectionError("the hub is gone")

    with pytest.raises(ConnectionError, match="the hub is gone"):
        write_store(tmp_path / "store", reading)


def test_a_copy_of_the_same_size_with_another_byte_is_damaged(store: Path) -> None:
    check_whole(store)
    tokens = store / "train" / "tokens.bin"
    tokens.write_bytes(b"\1" + tokens.read_bytes()[1:])
    with pytest.raises(UserError, match=r"train/tokens.bin\" is damaged; delete \".*\" and start again"):
        check_whole(store)
