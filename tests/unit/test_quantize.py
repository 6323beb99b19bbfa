"""int8 and int4 weights: close to bf16, smaller, for every Falcon."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SHAPES, make_model

from falcon_dist.contract import UserError
from falcon_dist.quantize import quantize, weight_bytes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.05), ("int4", 0.45)])
def test_logits_stay_near_and_weights_shrink(shape: str, kind: str, error: float) -> None:
    model = make_model(SHAPES[shape](hidden_size=128)).to(torch.bfloat16)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        before = model(tokens, use_cache=False).logits.float()
        size, done = weight_bytes(model), quantize(model, kind)
        after = model(tokens, use_cache=False).logits.float()
    moved = (after - before).norm() / before.norm()
    assert 0 < moved < error
    assert weight_bytes(model) < size
    assert done.layers >= 8
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 27)


def test_layers_that_do_not_fit_are_named_and_left() -> None:
    model = make_model(SHAPES["falcon-7b"](hidden_size=72)).to(torch.bfloat16)
    done = quantize(model, "int4")
    assert "transformer.h.0.self_attention.dense" in done.left
    assert "transformer.h.0.mlp.dense_4h_to_h" in done.left


def test_only_bf16_is_taken() -> None:
    with pytest.raises(UserError, match="weights must be bf16"):
        quantize(make_model(SHAPES["llama"]()), "int8")
