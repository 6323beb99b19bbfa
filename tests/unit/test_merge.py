"""Adapters that a run or somebody else left, added to a model: which are read, and which are refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import falcon_7b, llama, write_adapters, write_model

from falcon_dist import checkpoint
from falcon_dist.contract import UserError
from falcon_dist.engine.native import load_model
from falcon_dist.merge import merge
from falcon_dist.strategy.lora import WEIGHTS_FILE as WEIGHTS


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


def scaled(folder: Path, factor: float) -> None:
    tensors = {name: tensor * factor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def test_a_link_is_followed_once(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that trains turns its "best" to another checkpoint while the model of the verified one loads."""
    for step in (1, 2):
        with checkpoint.committed(tmp_path, step, {}) as folder:
            write_adapters(folder, base)
            scaled(folder, step)
    link = tmp_path / "best"

    def turned(*args: Any) -> Any:
        link.unlink()
        link.symlink_to("step-000002")
        return load_model(*args)

    def merged(adapter: Path, out: str) -> dict[str, torch.Tensor]:
        assert merge([str(adapter), "--into", str(tmp_path / out), "--precision", "fp32"]) == 0
        return load_file(tmp_path / out / "model.safetensors")

    expected = merged(tmp_path / "step-000001", "expected")
    link.symlink_to("step-000001")
    monkeypatch.setattr("falcon_dist.merge.load_model", turned)
    found = merged(link, "found")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    facts = checkpoint.read(tmp_path / "found").facts
    assert (facts["step"], facts["merged"]) == (1, str(tmp_path / "step-000001"))


def refused(adapter: Path, *words: str) -> str:
    out = adapter.parent / "out"
    with pytest.raises(UserError) as error:
        merge([str(adapter), "--into", str(out), *words])
    assert "\n" not in str(error.value)
    assert not out.exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (
            falcon_7b(hidden_size=128),
            r"Error(s) in loading state_dict for PeftModelForCausalLM: size mismatch for base_",
        ),
        (llama(), "Target modules"),
        (falcon_7b(num_hidden_layers=1), '"base_model.model.transformer.h.1.'),
        (falcon_7b(num_hidden_layers=3), '"base_model.model.transformer.h.2.'),
    ],
)
def test_adapters_of_others_do_not_fit_another_model(tmp_path: Path, base: Path, other: Any, told: str) -> None:
    adapter, place = write_adapters(tmp_path / "theirs", base), write_model(tmp_path / "other", other)
    said = refused(adapter, "--base", str(place))
    assert said.startswith(f'falcon merge: cannot add "{adapter}" to "{place}": {told}')
    assert said.endswith("; give whole adapters, and with --base the model they were trained on")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (
            lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8]),
            f"{WEIGHTS}: Error while",
        ),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), f"{WEIGHTS}: Error while"),
        (lambda folder: scaled(folder, float("nan")), "NaNs detected in the merged weights"),
    ],
)
def test_adapters_of_others_that_are_damaged(
    tmp_path: Path, base: Path, harm: Callable[[Path], Any], told: str
) -> None:
    adapter = write_adapters(tmp_path / "theirs", base)
    harm(adapter)
    assert refused(adapter).startswith(f'falcon merge: cannot add "{adapter}" to "{base}": {told}')


def test_no_pickle_is_read_where_the_adapters_are_missing(tmp_path: Path, base: Path) -> None:
    adapter = write_adapters(tmp_path / "theirs", base)
    (adapter / WEIGHTS).rename(adapter / "other.safetensors")
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    assert refused(adapter) == f'falcon merge: no {WEIGHTS} in "{adapter}"; fetch or save the adapters again'


@pytest.mark.parametrize(("name", "why"), [("file/more/out", "Not a directory"), ("x" * 300, "File name too long")])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, base: Path, name: str, why: str) -> None:
    adapter = write_adapters(tmp_path / "theirs", base)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f'cannot write ".*/{name}": {why}'):
        merge([str(adapter), "--into", str(tmp_path / name)])
