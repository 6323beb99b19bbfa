"""The engine's fast paths against a plain fp32 reference: logits, gradients, five optimizer steps; and no leak."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import SHAPES, VOCAB, falcon_rw, llama, make_model
from torch import library
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, PreTrainedModel

from falcon_dist.config import DataConfig, EngineConfig, ModelConfig, Precision, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.engine import head
from falcon_dist.engine.adamw import MasterAdamW
from falcon_dist.engine.attention import SEGMENTS, register, segment_attention, spans
from falcon_dist.engine.form import TrainingForm, choose
from falcon_dist.engine.head import head_loss
from falcon_dist.engine.native import WEIGHT_DTYPES, load_model
from falcon_dist.loss import token_losses
from falcon_dist.masking import Masking, leak, positions
from falcon_dist.rows import IGNORED
from falcon_dist.strategy.memory import predict

ROTARY = {**SHAPES, "falcon-rw": lambda: falcon_rw(alibi=False)}
RECORDS = torch.tensor([[0] * 20 + [1] * 150 + [2] * 14, [3] * 180 + [-1] * 4])
"""Segments that torch's kernel takes, and such that go by batched products."""
BOUNDS = {"fp32": (2e-6, 5e-6, 1e-5), "bf16": (0.02, 0.03, 0.05), "bf16-autocast": (0.02, 0.03, 0.05)}
"""By precision: largest relative error of logits, gradients and what five steps changed, in the Euclidean norm."""
GEMMA2 = Gemma2Config(
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=64,
)


def make_form(model: PreTrainedModel, **engine: str) -> TrainingForm:
    return TrainingForm(model, choose(model.config, ModelConfig(), EngineConfig(**engine)))


def fast_model(shape: str, dtype: torch.dtype) -> PreTrainedModel:
    register()
    return make_model(ROTARY[shape](), SEGMENTS).to(dtype).train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    tokens = torch.randint(0, VOCAB, RECORDS.shape)
    labels = torch.where(positions(RECORDS) == 0, IGNORED, tokens).masked_fill(RECORDS < 0, IGNORED)
    labels[0, 25:31] = IGNORED
    return tokens, labels


def train_loss(model: PreTrainedModel, form: TrainingForm, *, autocast: bool) -> torch.Tensor:
    tokens, labels = batch()
    inputs = {"input_ids": tokens, **Masking.of(model).inputs(RECORDS)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return form.loss(model, inputs, labels, 1 / int((labels != IGNORED).sum()))


def flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return float((flat(found) - flat(wanted)).norm() / flat(wanted).norm())


@pytest.mark.parametrize("length", [64, 400])
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("shape", ROTARY)
def test_nothing_leaks_in_the_form_that_trains(shape: str, precision: Precision, length: int) -> None:
    model = fast_model(shape, WEIGHT_DTYPES[precision])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-autocast")
    with make_form(model).training(), autocast:
        assert Masking.of(model).segments
        assert leak(model, batch=2, length=length) == 0.0


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("shape", ROTARY)
def test_logits_gradients_and_five_steps_against_the_plain_fp32_model(shape: str, precision: Precision) -> None:
    plain, fast = make_model(ROTARY[shape]()).train(), fast_model(shape, WEIGHT_DTYPES[precision])
    plain.load_state_dict(fast.state_dict())  # the same numbers, rounded or not
    start = flat(list(plain.parameters()))
    autocast = precision == "bf16-autocast"
    seen = [_five_steps(plain, fast=False), _five_steps(fast, fast=True, autocast=autocast)]
    of_logits, of_grads, of_steps = BOUNDS[precision]
    (logits, grads, state), (fast_logits, fast_grads, fast_state) = seen
    assert distance([fast_logits], [logits]) <= of_logits
    assert distance(fast_grads, grads) <= of_grads
    assert distance([flat(fast_state) - start], [flat(state) - start]) <= of_steps


def _five_steps(
    model: PreTrainedModel, *, fast: bool, autocast: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Logits and gradients before the first step, exact weights after the fifth."""
    form = (
        make_form(model)
        if fast
        else TrainingForm(model, choose(model.config, ModelConfig(attention="sdpa"), EngineConfig(head="plain")))
    )
    params = list(model.parameters())
    optimizer = MasterAdamW([{"params": params}], lr=1e-3, eps=1e-3)
    with form.training():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch()[0], use_cache=False, **Masking.of(model).inputs(RECORDS)).logits
        for step in range(5):
            train_loss(model, form, autocast=autocast).backward()
            if step == 0:
                grads = [p.grad.clone() for p in params if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
    assert len(grads) == len(params)
    return logits, grads, [optimizer.state[p].get("master", p) for p in params]


@pytest.mark.parametrize("autocast", [False, True])
def test_the_head_in_chunks_is_the_plain_loss(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, a bias, labels left out, a gradient from outside that is not 1."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 130, 32), torch.randn(VOCAB, 32) * 0.3, torch.randn(VOCAB)
    labels = torch.randint(0, VOCAB, (2, 130)).masked_fill(torch.rand(2, 130) < 0.3, IGNORED)
    monkeypatch.setattr(head, "CHUNK_BYTES", VOCAB * 64 * 4)
    monkeypatch.setattr(head, "BLOCK_BYTES", VOCAB * 7 * 4)
    found, wanted = [], []
    for grads, fused in ((found, True), (wanted, False)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and fused):
            whole = token_losses(torch.nn.functional.linear(*leaves), labels).sum() / 50
            loss = head_loss(*leaves, labels, 1 / 50) if fused else whole
        (loss * 3).backward()
        grads += [loss, *(leaf.grad for leaf in leaves)]
    for one, other in zip(found, wanted, strict=True):
        assert distance([one], [other]) <= (0.01 if autocast else 1e-6)


def test_the_head_never_holds_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    inner = head.softmax_gradient_

    def watch(logits: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(len(logits))
        return inner(logits, *rest)

    monkeypatch.setattr(head, "softmax_gradient_", watch)
    monkeypatch.setattr(head, "CHUNK_BYTES", VOCAB * 128 * 4)
    head_loss(torch.randn(1, 513, 16), torch.randn(VOCAB, 16), None, torch.zeros(1, 513, dtype=torch.int64))
    assert seen == [128] * 4


def test_rows_without_a_label_cost_and_change_nothing() -> None:
    hidden, weight = torch.randn(1, 8, 16, requires_grad=True), torch.randn(VOCAB, 16, requires_grad=True)
    loss = head_loss(hidden, weight, None, torch.full((1, 8), IGNORED))
    loss.backward()
    assert (float(loss), float(hidden.grad.abs().sum()), float(weight.grad.abs().sum())) == (0.0, 0.0, 0.0)


def test_frozen_output_layers_get_no_gradient() -> None:
    hidden, weight = torch.randn(1, 8, 16, requires_grad=True), torch.randn(VOCAB, 16)
    head_loss(hidden, weight, None, torch.arange(8)[None]).backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0


def test_segments_begin_at_position_zero() -> None:
    place = positions(RECORDS)
    assert [(s[0].start, s[2].start, s[2].stop) for s in spans(place, 2)] == [
        *((0, 0, 20), (0, 20, 170), (0, 170, 184)),
        *((1, 0, 180), (1, 180, 184)),
    ]
    assert list(spans(torch.arange(8)[None], 3)) == [(slice(None),) * 3]


def test_the_operator_keeps_torchs_rules() -> None:
    """Shapes, strides, aliasing and gradients as torch.compile relies on them."""
    heads = [torch.randn(*RECORDS.shape, 4, 16, requires_grad=True).transpose(1, 2)]
    heads += [torch.randn(*RECORDS.shape, 2, 16, requires_grad=True).transpose(1, 2) for _ in range(2)]
    library.opcheck(segment_attention, (*heads, positions(RECORDS), 0.25))


def test_the_plain_form_is_had_inside_training_and_after_it() -> None:
    model = fast_model("falcon-7b", torch.float32)
    form = make_form(model)
    tokens = batch()[0][:1]
    with torch.no_grad():
        plain = model(input_ids=tokens, use_cache=False).logits
        with form.training(), form.plain():
            assert model.config._attn_implementation == "sdpa"
            assert torch.equal(model(input_ids=tokens, use_cache=False).logits, plain)
            assert model.generate(input_ids=tokens[:, :9], max_new_tokens=3, do_sample=False).shape == (1, 12)
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, plain)


def test_models_that_do_not_fit_train_the_plain_way_and_say_why() -> None:
    chosen = choose(falcon_rw(), ModelConfig(), EngineConfig())
    assert (chosen.attention, chosen.chunked_head) == ("sdpa", True)
    assert "alibi" in chosen.reasons[0]
    other = choose(GPT2Config(), ModelConfig(), EngineConfig())
    assert (other.attention, other.chunked_head, len(other.reasons)) == ("sdpa", False, 2)
    assert choose(llama(attention_dropout=0.1), ModelConfig(), EngineConfig()).attention == "sdpa"


def test_what_was_asked_for_and_cannot_be_had_is_refused() -> None:
    with pytest.raises(UserError, match=r'model.attention: "segments" cannot be had: alibi'):
        choose(falcon_rw(), ModelConfig(attention="segments"), EngineConfig())
    with pytest.raises(UserError, match=r'engine.head: "chunked" cannot be had'):
        choose(GPT2Config(), ModelConfig(), EngineConfig(head="chunked"))
    with pytest.raises(UserError, match=r'model.attention: "sdpa" cannot be had: .*"gemma2"; set model.attention=auto'):
        choose(GEMMA2, ModelConfig(attention="sdpa"), EngineConfig())


def test_models_without_sdpa_train_by_eager_attention(tmp_path: Path) -> None:
    chosen = choose(GEMMA2, ModelConfig(), EngineConfig())
    assert (chosen.attention, chosen.plain_attention) == ("eager", "eager")
    assert predict(TrainConfig(data=DataConfig(max_length=16)), GEMMA2, 1).activations > 0
    AutoModelForCausalLM.from_config(GEMMA2).save_pretrained(tmp_path)
    model = load_model(tmp_path, ModelConfig(name=str(tmp_path)), "fp32").eval()
    assert model.config._attn_implementation == "eager"
    assert leak(model) == 0.0
