"""What a checkpoint keeps of the run that made it, and how a resumed run compares it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import write_model

from falcon_dist import identity
from falcon_dist.config import ModelConfig


def known(folder: Path) -> dict[str, str]:
    return identity.identity_of(str(folder), ModelConfig(name=str(folder)))


@pytest.mark.parametrize(
    ("name", "key", "changed"),
    [
        ("config.json", "layer_norm_epsilon", {"model_config"}),
        ("tokenizer_config.json", "model_max_length", {"tokenizer"}),
        ("tokenizer.json", "post_processor", {"tokenizer"}),
        ("config.json", "transformers_version", set()),
        ("generation_config.json", "temperature", set()),
    ],
)
def test_what_a_digest_stands_for(tmp_path: Path, name: str, key: str, changed: set[str]) -> None:
    folder = write_model(tmp_path)
    before, file = known(folder), folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), key: "7"}))
    after = known(folder)
    assert {what for what in before if before[what] != after[what]} == changed
    assert len({*before.values()}) == 3


def test_adapters_have_the_configuration_of_their_model(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert known(adapter)["model_config"] == known(base)["model_config"]


def test_code_is_every_python_file_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    seen = {identity.code_digest(tmp_path)}
    (tmp_path / "notes.md").write_text("no code")
    assert identity.code_digest(tmp_path) in seen
    for name, text in (("a.py", "x = 2\n"), ("sub.py", ""), ("sub.py", "\n")):
        (tmp_path / name).write_text(text)
        seen.add(identity.code_digest(tmp_path))
    assert len(seen) == 4


def test_differences_are_a_table() -> None:
    then = {"rows": "a" * 64, "seed": 0, "tokenizer": "c" * 64}
    now = {"rows": "b" * 64, "seed": 1, "tokenizer": "c" * 64, "model_config": "d" * 64, "code": "e" * 64}
    odd = identity.differences(then, now, (*identity.MADE_OF, "seed"))
    assert identity.table(odd) == [
        "                    then          now",
        "data (packed rows)  aaaaaaaaaaaa  bbbbbbbbbbbb",
        "seed                0             1",
    ]
    assert identity.unknown(then) == ["model config", "falcon-dist code"]
