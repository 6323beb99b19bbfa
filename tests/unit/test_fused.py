"""Passes of a step by compiled kernels and by torch's operators, against the plain mathematics in double precision."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import llama, make_model
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from falcon_dist.config import EngineConfig, ModelConfig
from falcon_dist.engine import attention, kernels, segment_kernel, segment_products
from falcon_dist.engine.attention import SEGMENTS, register
from falcon_dist.engine.form import TrainingForm, choose
from falcon_dist.engine.fused import FusedParts
from falcon_dist.engine.head import softmax_gradient_
from falcon_dist.engine.rotary import turned_heads
from falcon_dist.engine.segment_products import segment_gradients, segment_output
from falcon_dist.masking import Masking
from falcon_dist.rows import IGNORED
from falcon_dist.soundness import norm_of

ROUNDED = 0.003
"""Relative error of a result that was rounded to bf16 once."""


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(kernels, "loaded", lambda: None)
    elif shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    else:
        assert kernels.loaded() is not None
    torch.manual_seed(0)
    return request.param


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def exact(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.usefixtures("way")
def test_gated_products_and_their_gradients() -> None:
    gate, up, grad = (bf16(3, 7, 1501) for _ in range(3))
    gate[0, 0, :6] = torch.tensor([-300.0, -90.0, -80.0, 80.0, 300.0, 0.0])
    inputs = exact(gate, up)
    wanted = torch.nn.functional.silu(inputs[0]) * inputs[1]
    assert distance(kernels.swiglu(gate, up), wanted) < ROUNDED
    made = kernels.swiglu_backward(grad, gate, up)
    for found, of in zip(made, torch.autograd.grad(wanted, inputs, grad.double()), strict=True):
        assert distance(found, of) < 2 * ROUNDED
    gate[1, 2, 3] = float("nan")
    assert int(kernels.swiglu(gate, up).isnan().sum()) == 1


@pytest.mark.usefixtures("way")
def test_norms_and_their_gradients() -> None:
    x, weight, grad = bf16(2, 33, 83), bf16(83), bf16(2, 33, 83)
    x[0, 0] = 0
    inputs = exact(x, weight)
    wanted = inputs[1] * inputs[0] * torch.rsqrt(inputs[0].square().mean(-1, keepdim=True) + 1e-5)
    out, scale = kernels.rms(x, weight, 1e-5)
    assert distance(out, wanted) < ROUNDED
    made = kernels.rms_backward(grad, x, weight, scale)
    for found, of in zip(made, torch.autograd.grad(wanted, inputs, grad.double()), strict=True):
        assert distance(found, of) < ROUNDED
    x[1, 5, 7] = float("nan")
    assert int(kernels.rms(x, weight, 1e-5)[0].isnan().sum()) == 83


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [1, 2])
def test_turned_heads(rows: int) -> None:
    heads, grad = bf16(2, 9, 3, 16).requires_grad_(), bf16(2, 9, 3, 16)
    angles = (torch.rand(rows, 9, 8) * 6).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    (plain,) = exact(heads)
    wanted, _ = apply_rotary_pos_emb(plain, plain, cos.double(), sin.double(), unsqueeze_dim=2)
    made = turned_heads(heads, cos, sin)
    assert distance(made, wanted) < 2 * ROUNDED
    found, of = torch.autograd.grad(made, heads, grad)[0], torch.autograd.grad(wanted, plain, grad.double())[0]
    assert distance(found, of) < 2 * ROUNDED


@pytest.mark.usefixtures("way")
def test_losses_of_logits_and_their_gradients() -> None:
    logits, labels = bf16(5, 1003) * 4, torch.tensor([3, IGNORED, 1002, 0, 7])
    logits[2] -= 1000
    (plain,) = exact(logits)
    wanted = torch.nn.functional.cross_entropy(plain, labels, ignore_index=IGNORED, reduction="sum") * 0.25
    found = logits.clone()
    assert float(softmax_gradient_(found, labels, 0.25)) == pytest.approx(wanted.item(), rel=1e-5)
    assert distance(found, torch.autograd.grad(wanted, plain)[0]) < ROUNDED
    assert not found[1].any()
    logits[4, 11] = float("nan")
    assert softmax_gradient_(logits, labels, 0.25).isnan()


@pytest.mark.parametrize("length", [7, 33, 100])
def test_attention_in_blocks(length: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_products, "SCORES_AT_ONCE", 1)  # blocks of 32 queries
    query, grad = (bf16(2, length, 6, 16).transpose(1, 2) for _ in range(2))
    key, value = (bf16(2, length, 3, 16).transpose(1, 2) for _ in range(2))
    inputs = exact(query, key, value)
    scores = inputs[0] @ inputs[1].repeat_interleave(2, 1).transpose(2, 3) * 0.3
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    wanted = scores.softmax(-1) @ inputs[2].repeat_interleave(2, 1)
    out, norms = wanted.bfloat16(), scores.logsumexp(-1).float()
    if way == "compiled":
        out, found = segment_output(query, key, value, 0.3)
        assert distance(out, wanted) < 2 * ROUNDED
        torch.testing.assert_close(found, norms, rtol=0, atol=1e-5)
    made = segment_gradients(grad, query, key, value, out, norms, 0.3)
    for found, of in zip(made, torch.autograd.grad(wanted, inputs, grad.double()), strict=True):
        assert distance(found, of) < 0.01


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kernel", [False, True])
def test_attention_of_packed_rows_is_that_of_each_segment(
    kernel: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORTEST", 20)
    if not kernel:
        monkeypatch.setattr(segment_kernel, "serves", lambda *heads: False)
    place = torch.tensor([[*range(30), *range(10)], [*range(40)]])
    heads = [bf16(2, 40, count, 16).transpose(1, 2) for count in (6, 3, 3)]
    inputs = exact(*heads)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attention.attend(*heads, place, 0.3).transpose(1, 2)
    for row, part in ((0, slice(30)), (0, slice(30, 40)), (1, slice(40))):
        query, key, value = (x[row : row + 1, :, part] for x in inputs)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), is_causal=True, scale=0.3
        )
        assert distance(found[row : row + 1, :, part], wanted) < 2 * ROUNDED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 4095, 4097, 600_001])
def test_norms_of_gradients(dtype: torch.dtype, count: int, way: str) -> None:
    values = torch.randn(count).to(dtype)
    wanted = float(values.double().norm())
    assert float(norm_of([values])) == pytest.approx(wanted, rel=1e-6 if way == "compiled" else 1e-5)
    assert float(norm_of([values.repeat(2, 1).t(), values])) == pytest.approx(wanted * 3**0.5, rel=1e-5)
    assert (kernels.square_sum(values) is None) == (way == "torch")
    for odd in (math.nan, math.inf, 3e38) if count else ():
        values[-1] = odd
        found = norm_of([torch.ones(9), values])
        assert found.dtype == torch.float32
        assert not found.isfinite()


@pytest.mark.usefixtures("way")
def test_passes_are_in_fp32_whatever_tensors_are_made_of_elsewhere() -> None:
    x, weight, labels = bf16(40, 64), bf16(64), torch.arange(40)
    heads = [bf16(1, 2, 40, 16) for _ in "qkv"]

    def passes() -> list[Tensor]:
        scale = kernels.rms(x, weight, 1e-5)[1]
        made = [*kernels.rms_backward(x, x, weight, scale), softmax_gradient_(x.clone(), labels, 1.0)]
        if kernels.loaded() is not None:
            made += segment_output(*heads, 0.3)
        out, norms = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True)
        return [*made, *segment_gradients(heads[0], *heads, out, norms, 0.25), norm_of([x])]

    wanted = passes()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = passes()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_every_part_is_taken_and_given_back() -> None:
    model = make_model(llama())
    before = {name: part.forward for name, part in model.named_modules()}
    fused = FusedParts(model)
    changed = {name.rpartition(".")[2] for name, part in model.named_modules() if part.forward != before[name]}
    assert changed == {"norm", "input_layernorm", "post_attention_layernorm", "mlp"}  # attention is that of sdpa
    fused.remove()
    assert not any("forward" in vars(part) for part in model.modules())
    assert FusedParts(make_model(llama(hidden_act="gelu")))._before
    assert not any(isinstance(part, LlamaMLP) for part, _ in FusedParts(make_model(llama(hidden_act="gelu")))._before)


def test_norms_of_another_dtype_than_their_input_stay_plain() -> None:
    norm = LlamaRMSNorm(16).bfloat16()
    plain = norm(torch.ones(2, 16))
    FusedParts(norm)
    assert torch.equal(norm(torch.ones(2, 16)), plain)


@pytest.mark.usefixtures("way")
def test_adapters_in_every_layer_train_as_in_the_plain_form() -> None:
    register()
    grads = []
    for fast in (False, True):
        base = make_model(llama(), SEGMENTS).bfloat16() if fast else make_model(llama()).bfloat16().float()
        torch.manual_seed(1)
        wanted = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(base, wanted, autocast_adapter_dtype=False)
        adapters = {name: param for name, param in model.named_parameters() if param.requires_grad}
        torch.manual_seed(2)
        for param in adapters.values():
            param.data = (torch.randn(param.shape) * 0.1).bfloat16().to(param.dtype)
        tokens = torch.arange(40).view(2, 20)
        form = TrainingForm(
            base, choose(base.config, ModelConfig(attention="auto" if fast else "sdpa"), EngineConfig())
        )
        with form.training():
            beside = Masking.of(base).inputs(torch.zeros(2, 20, dtype=torch.int64))
            form.loss(model, {"input_ids": tokens, **beside}, tokens, 1 / 38).backward()
        grads.append(torch.cat([param.grad.double().flatten() for param in adapters.values()]))
    assert distance(grads[1], grads[0]) < 0.05


def test_memory_is_never_taken_for_what_it_does_not_hold() -> None:
    if kernels.loaded() is None:
        pytest.skip("there is no g++ here")
    scores, norms = torch.randn(1, 4, 4), torch.randn(1, 4)
    with pytest.raises(AssertionError):
        kernels.causal_softmax(scores.bfloat16(), 4, 1.0)
    for other in (scores, bf16(1, 4, 3)):
        with pytest.raises(AssertionError):
            kernels.causal_gradient_(scores, other, norms, norms, queries=4, scale=1.0)
    heads, half = bf16(1, 4, 2, 16), bf16(1, 4, 8)  # angles of half of a head
    assert not kernels.turn(heads, half, half, torch.empty_like(heads), back=False)


def test_a_library_is_compiled_once_and_none_that_fails_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    kernels.loaded.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        assert kernels.loaded() is not None
        (made,) = (tmp_path / "falcon-dist" / "kernels").iterdir()
        written = made.stat().st_mtime_ns
        kernels.loaded.cache_clear()
        assert kernels.loaded() is not None
        assert made.stat().st_mtime_ns == written
        kernels.loaded.cache_clear()
        empty = tmp_path / "again" / "falcon-dist" / "kernels" / made.name  # as a host leaves it that went down
        empty.parent.mkdir(parents=True)
        empty.touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "again"))
        assert kernels.loaded() is not None
        assert empty.stat().st_size
        kernels.loaded.cache_clear()
        monkeypatch.setattr(kernels, "_FLAGS", ("--no-such-flag",))
        assert kernels.loaded() is None
        assert "its kernels cannot be compiled" in caplog.text
        assert "no-such-flag" in caplog.text
        kernels.loaded.cache_clear()
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert kernels.loaded() is None
        assert "CXX names no program: 'no-such-compiler'" in caplog.text
        kernels.loaded.cache_clear()
        caplog.clear()
        monkeypatch.delenv("CXX")
        monkeypatch.setattr(shutil, "which", lambda name: None)
        assert kernels.loaded() is None
        assert not caplog.text
    finally:
        kernels.loaded.cache_clear()
