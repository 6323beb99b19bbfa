"""The article's recipe at Falcon-7B's true width: 14 GiB of memory, 10 GB of disk, a few minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launching import run_python
from recipe_run import three_steps
from safetensors import safe_open
from tiny_models import make_tokenizer
from transformers import FalconConfig, FalconForCausalLM


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
    last = three_steps(tmp_path, write_wide_falcon(tmp_path / "model"))
    with safe_open(sorted(last.glob("model*.safetensors"))[0], framework="pt") as weights:
        assert weights.get_tensor("transformer.word_embeddings.weight").shape == (65024, 4544)
    code = "import sys; from transformers import AutoConfig as C; print(C.from_pretrained(sys.argv[1]).model_type)"
    assert run_python(tmp_path, code, str(last)).stdout.strip() == "falcon"
