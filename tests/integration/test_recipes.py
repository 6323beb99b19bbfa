"""Every recipe is data that loads; the article's run goes three steps at Falcon-7B's true width."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch
from launching import launch, only_run, run_python, step_records
from safetensors import safe_open
from tiny_models import TEXT, make_tokenizer
from transformers import FalconConfig, FalconForCausalLM

from falcon_dist import checkpoint
from falcon_dist.config import TrainConfig, build, check_known, flatten, keys_of

RECIPES = sorted((Path(__file__).parents[2] / "falcon_dist" / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads(recipe: Path) -> None:
    values = flatten(tomllib.loads(recipe.read_text()), str(recipe))
    check_known(values, keys_of(TrainConfig))
    assert isinstance(build(TrainConfig, values), TrainConfig)


def write_wide_falcon(folder: Path) -> Path:
    """Falcon-7B but for its depth: 4544 wide, 71 heads, 65,024 tokens, 2 layers; random bf16 weights."""
    config = FalconConfig(num_hidden_layers=2)
    assert (config.hidden_size, config.num_attention_heads, config.vocab_size) == (4544, 71, 65024)
    with torch.device("meta"):
        model = FalconForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) * 0.02
    with torch.no_grad():
        for name, param in model.named_parameters():
            tiles = -(-param.numel() // len(block))
            param.copy_(block.repeat(tiles)[: param.numel()].view_as(param))
            if ("layernorm" in name and name.endswith("weight")) or "ln_f.weight" in name:
                param.fill_(1.0)
    model.tie_weights()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.timeout(600)
def test_falcon_7b_recipe_for_three_steps(tmp_path: Path) -> None:
    """The very recipe; only model and data are local ones of the same shape and form."""
    model = write_wide_falcon(tmp_path / "model")
    data = tmp_path / "guanaco.jsonl"
    data.write_text("".join(json.dumps({"text": TEXT[n % 2] + f" {n}"}) + "\n" for n in range(120)))
    places = ["--set", f"model.name={model}", "--set", f"data.name={data}"]
    done = launch(
        tmp_path, "--recipe", "falcon-7b", *places, "--set", "loop.max_steps=3", "--nproc-per-node", "1", timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = only_run(tmp_path)
    steps = step_records(run)
    assert sorted(steps) == [1, 2, 3]
    assert all(step["loss"] < 20 for step in steps.values())
    last = run / "checkpoints" / "step-000003"
    assert checkpoint.fault_of(last) is None
    with safe_open(sorted(last.glob("model*.safetensors"))[0], framework="pt") as weights:
        assert weights.get_tensor("transformer.word_embeddings.weight").shape == (65024, 4544)
    assert any((last / "train_state").glob("optimizer-*.safetensors"))
    code = "import sys; from transformers import AutoConfig as C; print(C.from_pretrained(sys.argv[1]).model_type)"
    assert run_python(tmp_path, code, str(last)).stdout.strip() == "falcon"
