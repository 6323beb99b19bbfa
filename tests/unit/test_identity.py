"""What a checkpoint keeps of the run that made it, and how a resumed run compares it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import write_model
from transformers import AutoModelForCausalLM

from falcon_dist import identity
from falcon_dist.config import LoraConfig, ModelConfig, TrainConfig
from falcon_dist.contract import UserError


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
    assert len({*before.values()}) == 4


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
    assert identity.unknown(then, now) == ["model config", "falcon-dist code", "software"]


def beside(folder: Path, **lora: object) -> dict[str, str]:
    config = TrainConfig(strategy="lora", model=ModelConfig(name=str(folder)), lora=LoraConfig(**lora))
    return identity.adapters_identity(str(folder), config)


@pytest.mark.parametrize("shards", ["10GB", "100KB"])
def test_adapters_know_the_weights_they_stand_beside_by_any_block_that_is_read(tmp_path: Path, shards: str) -> None:
    folder = tmp_path / "model"
    write_model(folder)
    if shards != "10GB":
        whole = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        whole.save_pretrained(folder, max_shard_size=shards)
    files = sorted(folder.glob("model*.safetensors"))
    assert (len(files) > 1) == (shards != "10GB")
    seen = {beside(folder)["base_weights"]}
    assert beside(folder)["base_weights"] in seen
    for file in files:
        for place in (0, file.stat().st_size // 2, file.stat().st_size - 1):
            flip_bit(file, place)
            seen.add(beside(folder)["base_weights"])
    assert len(seen) == 1 + 3 * len(files)


def flip_bit(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_fingerprint_reads_little_of_a_large_file(tmp_path: Path) -> None:
    large = tmp_path / "model.safetensors"
    with large.open("wb") as file:
        file.truncate(40 << 30)  # a hole; to read all of it would take minutes
    before = beside(tmp_path)
    with large.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"1")
    assert beside(tmp_path) != before


def test_an_index_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("[1]")
    with pytest.raises(UserError, match=r'index.json" does not list the files of the weights'):
        beside(tmp_path)


def test_what_an_adapter_is_made_like_is_compared_under_the_name_of_its_setting(tmp_path: Path) -> None:
    write_model(tmp_path)
    then, now = beside(tmp_path), beside(tmp_path, rank=4, alpha=8.0, targets=("dense",))
    assert identity.differences(then, now, identity.ADAPTERS) == [
        ("lora.rank", "16", "4"),
        ("lora.alpha", "32", "8"),
        ("lora.targets", "the attention's", "dense"),
    ]
    older = dict.fromkeys((*identity.MADE_OF, *identity.TOLD_ONLY), "x")
    assert identity.unknown(older, now) == ["base weights (fingerprint)", "lora.rank", "lora.alpha", "lora.targets"]
    assert identity.unknown(older, older) == []
    assert identity.differences(then, {"strategy": "ddp"}, identity.ADAPTERS) == []
    assert identity.adapters_identity(str(tmp_path), TrainConfig()) == {}
