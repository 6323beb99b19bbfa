"""int8 and int4 weights: close to bf16, smaller, the same from disk as made on the spot, for every Falcon."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import SHAPES, make_model, make_tokenizer, write_adapters

from falcon_dist import checkpoint
from falcon_dist.config import DataConfig, ModelConfig, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.native import load_model
from falcon_dist.prepare import find_model, prepare
from falcon_dist.quantize import quantize
from falcon_dist.weight_only import quantize_layers, ready, torchao, weight_bytes

TOKENS = torch.arange(24)[None]


def write(folder: Path, shape: str, **changes: int) -> Path:
    make_model(SHAPES[shape](hidden_size=128, **changes)).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(TOKENS, use_cache=False).logits.float()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "error"), [(8, 0.05), (4, 0.45)])
def test_checkpoint_answers_as_weights_quantised_on_the_spot(
    tmp_path: Path, shape: str, bits: int, error: float, capsys
) -> None:
    source = write(tmp_path / "model", shape)
    model = load_model(source, ModelConfig(name=""), "bf16")
    before, size = logits(model), weight_bytes(model)
    done = quantize_layers(model, "int8" if bits == 8 else "int4")
    ready(model)
    after = logits(model)
    assert 0 < (after - before).norm() / before.norm() < error
    assert weight_bytes(model) < size
    assert done.layers >= 8
    assert quantize([str(source), str(tmp_path / "out"), "--bits", str(bits), "--max-shard-size", "200KB"]) == 0
    assert f"{done.layers} layers in int{bits}, 0 left" in capsys.readouterr().out
    assert checkpoint.fault_of(tmp_path / "out") is None
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    again = load_model(tmp_path / "out", ModelConfig(name=""), "bf16")
    assert torch.equal(logits(again), after)
    assert weight_bytes(again) == weight_bytes(model)
    assert again.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (1, 27)


def test_plain_transformers_loads_and_runs_int8(tmp_path: Path) -> None:
    quantize([str(write(tmp_path / "model", "llama")), str(tmp_path / "out"), "--bits", "8"])
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M; m = M.from_pretrained(sys.argv[1])\n"
        "assert 'falcon_dist' not in sys.modules; print(m(torch.arange(24)[None]).logits.float().sum().item())"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "out")]
    said = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert float(said) == pytest.approx(
        float(logits(load_model(tmp_path / "out", ModelConfig(name=""), "bf16")).sum()), abs=1e-3
    )


def test_int4_is_rounded_as_torchao_rounds_for_cpus() -> None:
    layer = torch.nn.Linear(96, 64, bias=False, dtype=torch.bfloat16)
    model = make_model(SHAPES["llama"](hidden_size=96)).to(torch.bfloat16)
    name = "model.layers.1.mlp.up_proj"
    layer.weight = torch.nn.Parameter(model.get_submodule(name).weight.clone())
    quantize_layers(model, "int4")
    ready(model)
    settings = torchao("prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(32, set_inductor_config=False)
    torchao("quantization").quantize_(layer, settings)
    ours = model.get_submodule(name).weight
    assert torch.equal(ours.qdata, layer.weight.qdata)
    assert torch.equal(ours.scale_and_zero, layer.weight.scale_and_zero)


def test_layers_that_do_not_fit_are_named_and_left(tmp_path: Path, capsys) -> None:
    source = write(tmp_path / "model", "falcon-rw", ffn_hidden_size=200)
    assert quantize([str(source), str(tmp_path / "out"), "--bits", "4"]) == 0
    out = capsys.readouterr().out
    assert "4 layers in int4, 4 left in bf16" in out
    assert "transformer.h.0.mlp.dense_h_to_4h\n" in out
    again = load_model(tmp_path / "out", ModelConfig(name=""), "bf16")
    assert type(again.transformer.h[0].mlp.dense_h_to_4h.weight.data) is torch.Tensor
    assert logits(again).isfinite().all()


def test_what_is_refused(tmp_path: Path) -> None:
    source, out = write(tmp_path / "model", "llama"), tmp_path / "out"
    quantize([str(source), str(out), "--bits", "8"])
    with pytest.raises(UserError, match="exists already; name a new folder"):
        quantize([str(source), str(out), "--bits", "8"])
    with pytest.raises(UserError, match="quantised already; take the model that they were made from"):
        quantize([str(out), str(tmp_path / "twice"), "--bits", "4"])
    with pytest.raises(UserError, match="weights must be bf16"):
        quantize_layers(make_model(SHAPES["llama"]()), "int8")
    with pytest.raises(UserError, match=r"its weights are quantised: .*; train the one it was made from"):
        prepare(TrainConfig(model=ModelConfig(name=str(out)), data=DataConfig(name="x")), tmp_path, {})
    with pytest.raises(UserError, match='quantised weights run in bf16 only: "fp32"'):
        load_model(out, ModelConfig(name=""), "fp32")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": 0}))
    with pytest.raises(UserError, match=r"cannot be trusted: config.json has"):
        quantize([str(out), str(tmp_path / "damaged"), "--bits", "8"])
    assert not list(tmp_path.glob("*partial*"))


def test_a_link_is_followed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that trains turns its "best" to another checkpoint when one has been verified."""
    link = tmp_path / "best"
    for step, changes in ((1, {}), (2, {"num_hidden_layers": 3})):
        with checkpoint.committed(tmp_path, step, {}) as folder:
            write(folder, "llama", **changes)
    link.symlink_to("step-000001")

    def turned(config: ModelConfig) -> str:
        link.unlink()
        link.symlink_to("step-000002")
        return find_model(config)

    monkeypatch.setattr("falcon_dist.quantize.find_model", turned)
    assert quantize([str(link), str(tmp_path / "out"), "--bits", "8"]) == 0
    facts = checkpoint.read(tmp_path / "out").facts
    assert (facts["step"], facts["made_from"]) == (1, str(tmp_path / "step-000001"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize(("name", "why"), [("file/more/out", "Not a directory"), ("x" * 300, "File name too long")])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, name: str, why: str) -> None:
    source = write(tmp_path / "model", "llama")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f'cannot write ".*/{name}": {why}'):
        quantize([str(source), str(tmp_path / name), "--bits", "8"])


def test_adapters_are_merged_before_they_are_quantised(tmp_path: Path) -> None:
    adapters = write_adapters(tmp_path / "adapters", write(tmp_path / "model", "falcon-7b"))
    with pytest.raises(UserError, match=r"adapters without their model: .* run falcon merge .* --into FOLDER first"):
        quantize([str(adapters), str(tmp_path / "out"), "--bits", "8"])
    assert not (tmp_path / "out").exists()
