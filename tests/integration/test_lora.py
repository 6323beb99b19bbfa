"""LoRA on two real ranks: adapters that plain peft loads, exact resume, merge, chat and compare."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from launching import launch, only_run, run_python, step_records, weights_digest, write_inputs
from safetensors.torch import load_file, save_file
from tiny_models import SHAPES, make_model

from falcon_dist.config import LoraConfig, ModelConfig, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.merge import merge
from falcon_dist.strategy.lora import Lora, trained_parameters
from falcon_dist.world import World

ADAPTER = ("adapter_model", "train_state/optimizer-")
FLAGS = ("--nproc-per-node", "2", "--set", "strategy=lora", "--set", "lora.rank=4", "--set", "lora.dropout=0.1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    done = launch(folder, "--recipe", str(write_inputs(folder)), "--run-id", "whole", *FLAGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def last(folder: Path) -> Path:
    return only_run(folder) / "checkpoints" / "step-000008"


def test_loss_falls_and_only_adapters_are_saved(whole: Path) -> None:
    steps = step_records(only_run(whole))
    assert steps[8]["loss"] < steps[1]["loss"]
    adapters = load_file(last(whole) / "adapter_model.safetensors")
    assert {name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapters} == {"query_key_value"}
    assert all(bool(tensor.count_nonzero()) for tensor in adapters.values())
    assert not list(last(whole).glob("model*.safetensors"))


PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval() if sys.argv[2] else base.eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(40)[None], use_cache=False).logits
assert "falcon_dist" not in sys.modules
save_file({"logits": logits}, sys.argv[3])
"""


def logits_of(folder: Path, base: Path, adapter: Path | None) -> torch.Tensor:
    run_python(folder, PLAIN_PEFT, str(base), str(adapter or ""), str(folder / "logits"))
    return load_file(folder / "logits")["logits"]


def test_merged_weights_give_the_logits_that_plain_peft_gives(whole: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        words = ["--into", str(tmp_path / precision), "--precision", precision, "--max-shard-size", "100KB"]
        assert merge([str(last(whole)), *words]) == 0
    expected = logits_of(tmp_path, whole / "model", last(whole))
    assert torch.allclose(logits_of(tmp_path, tmp_path / "fp32", None), expected, rtol=0, atol=1e-5)
    untuned = logits_of(tmp_path, whole / "model", None)
    rounding = (logits_of(tmp_path, tmp_path / "bf16", None) - expected).abs().max()
    assert rounding < 0.1 * expected.abs().max()
    assert not torch.allclose(untuned, expected, rtol=0, atol=1e-3)
    assert len(list((tmp_path / "fp32").glob("model-0*.safetensors"))) > 1
    assert json.loads((tmp_path / "fp32" / "manifest.json").read_text())["facts"]["strategy"] == "lora"


def test_resumed_on_two_ranks_has_the_same_adapters_and_state(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(only_run(whole), tmp_path / "runs" / "r")
    checkpoints = tmp_path / "runs" / "r" / "checkpoints"
    for step in (6, 8):
        (checkpoints / f"step-{step:06d}" / "manifest.json").unlink()
    resumed = launch(tmp_path, "--resume", "r", "--nproc-per-node", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert min(step_records(tmp_path / "runs" / "r", attempt=2)) == 5
    assert weights_digest(checkpoints / "step-000008", ADAPTER) == weights_digest(last(whole), ADAPTER)
    assert len(weights_digest(last(whole), ADAPTER)) == 3


def test_other_base_weights_and_other_adapters_are_refused_in_a_table(whole: Path, tmp_path: Path) -> None:
    """The same folder was exported again: its config.json is the same, its weights are not."""
    shutil.copytree(only_run(whole), tmp_path / "runs" / "r")
    weights = whole / "model" / "model.safetensors"
    before = weights.read_bytes()
    changed = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
    try:
        save_file(changed, weights, metadata={"format": "pt"})
        other = launch(tmp_path, "--resume", "r", "--nproc-per-node", "2", "--set", "lora.alpha=8")
    finally:
        weights.write_bytes(before)
    assert other.returncode == 2, other.stdout + other.stderr
    assert '--resume: base weights (fingerprint) was "' in other.stderr
    assert "(and 1 more, see above)" in other.stderr
    assert re.search(r"base weights \(fingerprint\)  ([0-9a-f]{12})  (?!\1)[0-9a-f]{12}\n", other.stdout), other.stdout
    assert re.search(r"lora.alpha +32 +8\n", other.stdout)


def test_chat_and_compare_take_a_folder_of_adapters(whole: Path, tmp_path: Path) -> None:
    told = launch(whole, "chat", str(last(whole)), "--max-length", "3", command="falcon", input="Hello\n")
    assert told.returncode == 0, told.stderr
    assert "tokens/s]" in told.stdout
    words = ("compare", str(whole / "model"), str(last(whole)), "--precision", "fp32", "--format", "json")
    found = launch(whole, *words, command="falcon")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["gain"] > 0


def test_what_cannot_be_merged_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config\.json in"):
        merge([str(whole / "model"), "--into", str(tmp_path / "x")])
    with pytest.raises(UserError, match="exists already"):
        merge([str(last(whole)), "--into", str(whole / "model")])


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_adapters_are_where_the_family_has_its_attention(shape: str) -> None:
    model = make_model(SHAPES[shape]())
    expected = trained_parameters(model, LoraConfig(rank=4))
    Lora(TrainConfig(lora=LoraConfig(rank=4)), World()).ready(model)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert sum(param.numel() for param in trained.values()) == expected > 0
    assert all(".self_attention." in name or ".self_attn." in name for name in trained)


def test_adapters_tell_the_commit_of_their_model() -> None:
    model = make_model(SHAPES["falcon-7b"]())
    Lora(TrainConfig(model=ModelConfig(name="me/base", revision="abc")), World()).ready(model)
    assert model.peft_config["default"].to_dict()["revision"] == "abc"


def test_a_layer_that_is_not_there_is_named(tmp_path: Path) -> None:
    lora = Lora(TrainConfig(lora=LoraConfig(targets=("q_proj",))), World())
    with pytest.raises(UserError, match='no such linear layer: "q_proj"; it has dense, dense_4h_to_h'):
        lora.ready(make_model(SHAPES["falcon-7b"]()))
