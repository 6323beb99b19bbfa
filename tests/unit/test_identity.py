"""What a checkpoint keeps of the run that made it, and how a resumed run compares it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from saves.ranks import bare_run
from tiny_models import falcon_7b, make_model, make_tokenizer, write_adapters, write_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from falcon_dist import checkpoint, identity, resume
from falcon_dist.config import LoraConfig, ModelConfig, OptimConfig, Precision, StrategyName, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.native import load_config, load_model
from falcon_dist.identity import digest_of
from falcon_dist.merge import merge
from falcon_dist.run import _note_of_sums, run_facts
from falcon_dist.world import World


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


def test_hosts_have_to_agree_on_the_model_and_not_on_versions() -> None:
    one = {"tokenizer": "a", "model_config": "b", "code": "c", "software": "d", "base_weights": "e"}
    for name in one:
        same = digest_of({**one, name: "z"}) == digest_of(one)
        assert same == (name in ("code", "software"))


def test_adapters_have_the_configuration_of_their_model(tmp_path: Path) -> None:
    base, adapter = write_model(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert known(adapter)["model_config"] == known(base)["model_config"]


def test_code_is_every_file_of_python_and_cpp_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    seen = {identity.code_digest(tmp_path)}
    (tmp_path / "notes.md").write_text("no code")
    assert identity.code_digest(tmp_path) in seen
    for name, text in (("a.py", "x = 2\n"), ("sub.py", ""), ("sub.py", "\n"), ("k.cpp", ""), ("k.h", "")):
        (tmp_path / name).write_text(text)
        seen.add(identity.code_digest(tmp_path))
    assert len(seen) == 6


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


def test_ranks_that_are_sent_no_weights_have_to_begin_with_the_same(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_model(falcon_7b(), seed=seed).save_pretrained(tmp_path / name)

    def told(name: str, strategy: StrategyName) -> dict[str, str]:
        return identity.unshared(str(tmp_path / name), TrainConfig(strategy=strategy))

    assert told("a", "full-lowmem") == told("b", "full-lowmem") != told("c", "full-lowmem")
    assert told("a", "ddp") == told("c", "zero3") == {}


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


def write_other(folder: Path) -> Path:
    """A model of the same shape as ``write_model``'s."""
    make_model(falcon_7b(), seed=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def trained(folder: Path, base: Path, **told: object) -> Path:
    """A checkpoint of adapters, as a LoRA run keeps it."""
    with checkpoint.written(folder, {"step": 1, "base_weights": beside(base)["base_weights"]}) as partial:
        write_adapters(partial, base, **told)
    return folder


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(torch.arange(24)[None], use_cache=False).logits


def loaded(folder: Path) -> torch.Tensor:
    return logits(load_model(folder, ModelConfig(name=str(folder)), "fp32"))


def test_adapters_come_beside_no_other_weights_of_the_same_shape(tmp_path: Path) -> None:
    base, other = write_model(tmp_path / "base"), write_other(tmp_path / "other")
    adapters = trained(tmp_path / "adapters", base)
    expected, out = loaded(adapters), tmp_path / "merged"
    refusal = r'these adapters were trained on other weights than those of ".*/%s" \(fingerprint [0-9a-f]{12} '
    with pytest.raises(UserError, match=refusal % "other"):
        merge([str(adapters), "--into", str(out), "--base", str(other)])
    base.rename(tmp_path / "moved")
    merge([str(adapters), "--into", str(out), "--base", str(tmp_path / "moved"), "--precision", "fp32"])
    assert torch.allclose(loaded(out), expected, atol=1e-5)
    other.rename(base)
    for way in (lambda: loaded(adapters), lambda: merge([str(adapters), "--into", str(tmp_path / "again")])):
        with pytest.raises(UserError, match=refusal % "base"):
            way()
    assert not (tmp_path / "again").exists()


def test_adapters_of_others_tell_no_weights_and_a_model_that_is_gone_is_named(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    loaded(write_adapters(tmp_path / "theirs", base))
    adapters = trained(tmp_path / "adapters", base)
    shutil.rmtree(base)
    with pytest.raises(UserError, match="cannot load"):
        loaded(adapters)
    with pytest.raises(UserError, match=r'no such folder: ".*/base"'):
        merge([str(adapters), "--into", str(tmp_path / "merged")])


def test_adapters_find_their_model_at_the_commit_they_were_trained_on(tmp_path: Path, monkeypatch) -> None:
    hub = tmp_path / "models--me--base"
    then, now = "a" * 40, "b" * 40
    base = write_model(hub / "snapshots" / then)
    write_other(hub / "snapshots" / now)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(now)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expected = loaded(trained(tmp_path / "local", base))
    adapters = trained(tmp_path / "adapters", base, base_model_name_or_path="me/base", revision=then)
    shutil.copyfile(tmp_path / "local/adapter_model.safetensors", adapters / "adapter_model.safetensors")
    assert torch.equal(loaded(adapters), expected)
    (adapters / checkpoint.MANIFEST).unlink()  # its sums are no longer right
    for words in ([], ["--base", "me/base"]):
        out = tmp_path / f"merged-{len(words)}"
        merge([str(adapters), "--into", str(out), "--precision", "fp32", *words])
        assert torch.allclose(loaded(out), expected, atol=1e-5)
    (hub / "snapshots" / now / "config.json").unlink()
    assert load_config(adapters, ModelConfig(name="")).hidden_size == 64
    unpinned = trained(tmp_path / "unpinned", base, base_model_name_or_path="me/base")
    with pytest.raises(UserError, match='trained on other weights than those of "me/base"'):
        loaded(unpinned)


def test_a_checkpoint_may_know_its_rows_by_their_bytes_or_as_older_ones_did(tmp_path: Path) -> None:
    made = bare_run(World(), {}, tmp_path)
    for digest, of_manifest, same in ((b"new", b"old", True), (b"old", b"any", True), (b"other", b"another", False)):
        saved = dataclasses.replace(made, store=SimpleNamespace(digest=digest, of_manifest=of_manifest))
        chosen = checkpoint.Checkpoint(tmp_path, 1, run_facts(saved))
        now = dataclasses.replace(made, store=SimpleNamespace(digest=b"new", of_manifest=b"old"))
        if same:
            resume._check_same_run(now, chosen)
        else:
            with pytest.raises(UserError, match="data \\(packed rows\\) was"):
                resume._check_same_run(now, chosen)


def test_another_learning_rate_is_told_and_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = bare_run(World(), {}, tmp_path)
    config = dataclasses.replace(made.config, optim=OptimConfig(lr=1e-3))
    chosen = checkpoint.Checkpoint(tmp_path, 1, run_facts(made))
    resume._check_same_run(made, chosen)
    assert "settings" not in capsys.readouterr().out
    resume._check_same_run(dataclasses.replace(made, config=config), chosen)
    told = capsys.readouterr().out.splitlines()
    start = told.index("with other settings from here on:")
    assert [line.split() for line in told[start + 1 : start + 3]] == [["then", "now"], ["optim.lr", "2e-05", "0.001"]]


def test_many_micro_batches_summed_in_bf16_are_told(tmp_path: Path) -> None:
    made = bare_run(World(), {}, tmp_path)

    def told(count: int, precision: Precision) -> list[str]:
        config = dataclasses.replace(made.config, precision=precision)
        return _note_of_sums(
            dataclasses.replace(made, config=config, schedule=dataclasses.replace(made.schedule, grad_accum=count))
        )

    (line,) = told(65, "bf16")
    assert line.startswith("loop.grad_accum: gradients of 65 micro-batches are summed in bf16")
    assert told(64, "bf16") == told(65, "fp32") == []


def test_another_dropout_of_adapters_is_told_and_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = bare_run(World(), {}, tmp_path)
    made = dataclasses.replace(made, config=dataclasses.replace(made.config, strategy="lora"))
    config = dataclasses.replace(made.config, lora=LoraConfig(dropout=0.5))
    chosen = checkpoint.Checkpoint(tmp_path, 1, run_facts(made))
    resume._check_same_run(dataclasses.replace(made, config=config), chosen)
    assert ["lora.dropout", "0.0", "0.5"] in [line.split() for line in capsys.readouterr().out.splitlines()]
