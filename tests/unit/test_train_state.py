"""A checkpoint's state as a resumed run reads it: hashed on the way, each file by its own name."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from falcon_dist import checkpoint, train_state
from falcon_dist.contract import UserError
from falcon_dist.train_state import Kept

NAMES = [f"layer{n}.weight" for n in range(4)]


def state(value: float) -> Kept:
    return Kept(
        weights={name: torch.full((6, 4), value, dtype=torch.bfloat16) for name in NAMES},
        optimizer={f"exp_avg/{name}": torch.full((6, 4), value) for name in NAMES},
        steps=int(value),
        describe=lambda folder: (folder / "config.json").write_text("{}"),
    )


def save(root: Path, kept: Kept) -> Path:
    shards = kept.shards(writers=2, max_bytes=60)
    with checkpoint.committed(root, kept.steps, {"run_id": "r"}) as folder:
        train_state.write_shards(folder, shards, kept.tensors)
        train_state.write_rest(folder, kept, shards)
    return root / checkpoint.folder_name(kept.steps)


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    target = state(0)
    optimizer, steps = train_state.load(save(tmp_path, state(3)), target)
    assert steps == 3
    assert all(bool((tensor == 3).all()) for tensor in (*target.weights.values(), *optimizer.values()))
    assert set(optimizer) == {f"exp_avg/{name}" for name in NAMES}


def test_a_flipped_bit_anywhere_in_what_is_read_is_found_and_named(tmp_path: Path) -> None:
    """Also in a header, where other names, shapes and lengths are read before the file's end."""
    path, chance = save(tmp_path, state(3)), random.Random(0)
    files = [path / name for name in checkpoint.read_manifest(path)[1] if "config" not in name and "index" not in name]
    assert len(files) >= 6
    for file in files:
        whole, name = file.read_bytes(), str(file.relative_to(path))
        for bit in chance.sample(range(8 * len(whole)), min(150, 8 * len(whole))):
            data = bytearray(whole)
            data[bit // 8] ^= 1 << bit % 8
            file.write_bytes(data)
            with pytest.raises(checkpoint.DamagedError, match=f"^{name} is not what was written"):
                train_state.load(path, state(0))
        file.write_bytes(whole)
    assert train_state.load(path, state(0))[1] == 3


def test_a_file_that_has_gone_since_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, state(3))
    (path / "train_state/optimizer-00002-of-00002.safetensors").unlink()
    with pytest.raises(checkpoint.DamagedError, match=r"^train_state/optimizer-00002.*\.safetensors is missing"):
        train_state.load(path, state(0))


def test_weights_of_another_model_are_bad_input(tmp_path: Path) -> None:
    path, target = save(tmp_path, state(3)), state(0)
    more = Kept(weights={**target.weights, "odd": torch.zeros(1)}, optimizer={}, steps=0, describe=id)
    with pytest.raises(UserError, match='weights do not fit the model: no "odd"'):
        train_state.load(path, more)
    fewer = Kept(weights={NAMES[0]: target.weights[NAMES[0]]}, optimizer={}, steps=0, describe=id)
    with pytest.raises(UserError, match=r'cannot be used: weights do not fit the model: unexpected "layer'):
        train_state.load(path, fewer)
