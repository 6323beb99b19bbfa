"""Weight gradients from transposed copies, and turned heads, against torch's and transformers' own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from types import MethodType

import pytest
import torch
from tiny_models import falcon_7b, make_model
from torch import nn
from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

from falcon_dist.config import TrainConfig
from falcon_dist.engine import linear
from falcon_dist.engine.attention import SEGMENTS, register
from falcon_dist.engine.form import TrainingForm, choose
from falcon_dist.engine.head import LossHead
from falcon_dist.engine.linear import FastLayers, trained_layers, weight_gradient
from falcon_dist.engine.rotary import shared_heads
from falcon_dist.strategy.choice import make_strategy
from falcon_dist.world import World


@pytest.fixture(params=[True, False], ids=["compiled", "no-compiler"])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param and shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    monkeypatch.setattr(linear, "SMALLEST", 128)
    monkeypatch.setattr(linear, "has_tiles", lambda: True)
    if not request.param:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    linear._transposed.cache_clear()
    yield
    linear._transposed.cache_clear()


SIZES = [(200, 130, 260), (200, 260, 130), (256, 1600, 128), (8, 130, 130), (200, 64, 130)]
"""Wide and narrow, much wider, few rows, an adapter's width."""


@pytest.mark.usefixtures("compiler")
def test_weight_gradients_are_the_plain_product() -> None:
    torch.manual_seed(0)
    for rows, width, inner in SIZES:
        grad, x = torch.randn(rows, width).bfloat16(), torch.randn(rows, inner).bfloat16()
        found = weight_gradient(grad, x)
        wanted = grad.double().T @ x.double()
        assert found.is_contiguous()
        assert float((found.double() - wanted).norm() / wanted.norm()) < 0.003


@pytest.mark.usefixtures("compiler")
def test_layers_give_what_they_gave_and_are_left_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 384, bias=False), nn.Linear(384, 128), nn.Linear(128, 128, bias=False))
    model.bfloat16()[2].weight.requires_grad_(False)
    x = torch.randn(2, 150, 256).bfloat16()
    seen = []
    for fast in (False, True):
        layers = FastLayers(trained_layers(model, None) if fast else iter(()))
        inputs = x.clone().requires_grad_()
        out = model(inputs)
        out.float().square().sum().backward()
        seen.append([out.detach(), inputs.grad, model[0].weight.grad])
        model.zero_grad()
        if fast:
            assert layers._layers == [model[0]]
        layers.remove()
    assert "forward" not in vars(model[0])
    for plain, ours in zip(*seen, strict=True):
        assert float((plain.float() - ours.float()).norm() / plain.float().norm()) < 0.005


def test_a_forward_that_a_layer_was_given_before_is_given_back() -> None:
    """As those of Falcon's layers under zero3, by which no weight is kept whole until backward."""
    for put_on in (lambda layer: FastLayers(iter([layer])), LossHead):
        layer = nn.Linear(8, 4, bias=False)
        layer.forward = given = MethodType(nn.Linear.forward, layer)
        put_on(layer).remove()
        assert vars(layer)["forward"] is given
        del layer.forward
        put_on(layer).remove()
        assert "forward" not in vars(layer)


def test_zero3_has_no_fast_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SMALLEST", 32)
    monkeypatch.setattr(linear, "has_tiles", lambda: True)
    register()
    for strategy, gain in (("zero2", True), ("zero3", False)):
        model = make_model(falcon_7b(), SEGMENTS).bfloat16()
        config = TrainConfig(strategy=strategy)
        make_strategy(config, World()).ready(model)
        layer = model.transformer.h[0].mlp.dense_h_to_4h
        before = layer.forward
        form = TrainingForm(model, choose(model.config, config.model, config.engine, config.strategy))
        with form.training():
            assert (layer.forward != before) == gain
            with form.plain():
                assert layer.forward == before
            assert (layer.forward != before) == gain
        assert layer.forward == before


def test_without_amx_every_layer_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SMALLEST", 128)
    layer = nn.Linear(256, 384, bias=False).bfloat16()
    for tiles, gaining in ((True, [layer]), (False, [])):
        monkeypatch.setattr(linear, "has_tiles", lambda tiles=tiles: tiles)
        assert list(trained_layers(layer, None)) == gaining


def test_turned_heads_are_those_of_transformers() -> None:
    torch.manual_seed(0)
    batch, length, heads, width = 2, 7, 3, 8
    angles = torch.rand(batch, length, width // 2, dtype=torch.float64).repeat(1, 1, 2) * 6
    cos, sin = angles.cos(), angles.sin()
    fused = torch.randn(batch, length, heads + 2, width, dtype=torch.float64, requires_grad=True)
    query, key, value = (fused[:, :, part].transpose(1, 2) for part in (slice(heads), slice(-2, -1), slice(-1, None)))
    wanted = (*apply_rotary_pos_emb(query, key, cos, sin), value)
    found = tuple(x.transpose(1, 2) for x in shared_heads(fused, cos, sin))
    grads = [torch.randn_like(x) for x in wanted]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(*(torch.autograd.grad(made, fused, grads)[0] for made in (found, wanted)))


def test_heads_are_turned_without_data_too() -> None:
    fused = torch.empty(2, 7, 5, 8, device="meta")
    angles = torch.empty(2, 7, 8, device="meta")
    assert [tuple(x.shape) for x in shared_heads(fused, angles, angles)] == [(2, 7, 3, 8), (2, 7, 1, 8), (2, 7, 1, 8)]


def test_a_compiler_that_fails_is_no_compiler_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> object:
        def call(matrix: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no space left on device")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(linear, "SMALLEST", 128)
    monkeypatch.setattr(linear, "has_tiles", lambda: True)
    linear._transposed.cache_clear()
    grad, x = torch.randn(200, 130).bfloat16(), torch.randn(200, 260).bfloat16()
    assert torch.equal(weight_gradient(grad, x), grad.t().contiguous() @ x)
    assert "no kernel: no space left on device" in caplog.text
    linear._transposed.cache_clear()
