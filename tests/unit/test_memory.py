"""What is predicted of memory: exact where it can be counted, refused where it cannot fit, mapped where shared."""

from __future__ import annotations

import dataclasses
import json
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from tiny_models import SHAPES, llama, make_model, write_model
from torch.profiler import ProfilerActivity, profile
from transformers import FalconConfig, Qwen2Config

from falcon_dist import host_memory
from falcon_dist.config import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    LoopConfig,
    ModelConfig,
    Precision,
    StrategyName,
    Switch,
    TrainConfig,
)
from falcon_dist.contract import UserError
from falcon_dist.engine import widened
from falcon_dist.engine.adafactor import Adafactor
from falcon_dist.engine.form import TrainingForm, choose
from falcon_dist.engine.native import WEIGHT_DTYPES, load_config, load_model
from falcon_dist.estimate import estimate
from falcon_dist.masking import Masking
from falcon_dist.strategy.choice import make_strategy
from falcon_dist.strategy.held_out import held_out_bytes
from falcon_dist.strategy.memory import GIB, check_fits, predict
from falcon_dist.world import World

FALCON_7B = 6_921_720_704
FALCON_IN_BF16 = FalconConfig(dtype="bfloat16")
SMALL = TrainConfig(data=DataConfig(max_length=64), loop=LoopConfig(micro_batch=2))


def test_state_of_falcon_7b() -> None:
    for precision, each in (("fp32", 4), ("bf16", 2)):
        found = predict(TrainConfig(precision=precision), FalconConfig(), 1)
        assert found.weights == found.gradients == each * FALCON_7B
        assert found.optimizer == {"fp32": 8, "bf16": 12}[precision] * FALCON_7B
    low = predict(TrainConfig(strategy="full-lowmem"), FalconConfig(), 1)
    assert low.gradients == 2 * 2 * 65024 * 4544  # those of the tied embedding's two uses
    lora = predict(TrainConfig(strategy="lora"), FALCON_IN_BF16, 1)
    assert (lora.mapped, lora.weights) == (2 * FALCON_7B, 2 * 32 * 16 * (4544 + 4672))
    assert lora.on_host(4) < 2 * lora.total


@pytest.mark.parametrize(
    ("strategy", "precision", "again"),
    [
        ("ddp", "bf16", False),
        ("lora", "bf16", False),
        ("full-lowmem", "bf16", False),
        ("ddp", "fp32", False),
        ("ddp", "bf16-autocast", False),
        ("ddp", "bf16-autocast", True),
        ("lora", "bf16-autocast", False),
    ],
)
@pytest.mark.parametrize("shape", ["falcon-7b", "falcon-40b", "llama"])
def test_activations_are_those_that_a_real_forward_keeps(
    shape: str, strategy: StrategyName, precision: Precision, again: bool
) -> None:
    loop = dataclasses.replace(SMALL.loop, grad_checkpointing=again)
    config = dataclasses.replace(SMALL, strategy=strategy, precision=precision, loop=loop)
    plan = SHAPES[shape]()
    expected = predict(config, plan, 1).activations
    model = make_model(plan, attention="segments").to(WEIGHT_DTYPES[precision]).train()
    made = make_strategy(config, World())
    made.ready(model)
    if again:
        model.activation_checkpointing_enable({"use_reentrant": False})
    kept = {param.untyped_storage().data_ptr(): 0 for param in model.parameters()}
    kept.update({buffer.untyped_storage().data_ptr(): 0 for buffer in model.buffers()})

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    form = TrainingForm(model, choose(plan, config.model, config.engine))
    records = torch.zeros(2, 64, dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-autocast")
    with form.training(), autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs = Masking.of(model).inputs(records)
        model.base_model(input_ids=torch.ones(2, 64, dtype=torch.int64), use_cache=False, **inputs)
    assert expected == pytest.approx(sum(kept.values()), rel=0.02)


def test_what_widened_products_keep_is_counted_where_bf16_is_multiplied_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for multiplies in (True, False):
        monkeypatch.setattr(widened, "multiplies_bf16", lambda multiplies=multiplies: multiplies)
        for precision in ("bf16", "fp32"):
            config = dataclasses.replace(SMALL, strategy="lora", precision=precision)
            found[multiplies, precision] = predict(config, llama(vocab_size=4096), 1).working
    assert found[True, "fp32"] == found[False, "fp32"]
    assert found[False, "bf16"] - found[True, "bf16"] == 3 * 4 * widened.PIECE


def test_a_head_in_chunks_is_no_wide_layer_and_a_plain_one_is() -> None:
    tied, own = llama(vocab_size=4096), llama(vocab_size=4096, tie_word_embeddings=False)
    assert predict(SMALL, tied, 1).working == predict(SMALL, own, 1).working
    plain = dataclasses.replace(SMALL, engine=EngineConfig(head="plain"))
    rows = 2 * 64
    gained = predict(plain, own, 1).working - predict(plain, tied, 1).working
    assert gained == 4 * rows * (4096 - 128) * 2


@pytest.mark.parametrize("strategy", ["ddp", "lora", "full-lowmem"])
def test_logits_of_a_held_out_row_count_where_training_takes_less(strategy: StrategyName) -> None:
    """Training has them in chunks and, where it computes layers again, keeps little; evaluation has them whole."""
    plan, loop = llama(vocab_size=1 << 16), LoopConfig(grad_checkpointing=True)
    rows = TrainConfig(strategy=strategy, loop=loop, data=DataConfig(max_length=4096))
    held = dataclasses.replace(rows, data=dataclasses.replace(rows.data, eval_share=0.1))
    without, found = predict(rows, plan, 1), predict(held, plan, 1)
    logits = 2 * 4096 * (1 << 16)
    assert without.activations + without.working < logits
    freed = found.gradients if strategy == "ddp" else 0
    assert logits < found.activations + found.working + freed < 1.5 * logits
    small = dataclasses.replace(SMALL, strategy=strategy)
    measured = dataclasses.replace(small, data=dataclasses.replace(small.data, eval_share=0.1))
    assert predict(measured, llama(), 1) == predict(small, llama(), 1)


def peak_bytes(model: torch.nn.Module, length: int) -> int:
    """The most that a row's forward takes at once in the plain form, without logits."""
    records = torch.zeros(1, length, dtype=torch.int64)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model.base_model(input_ids=records, use_cache=False, **Masking.of(model).inputs(records))
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", ["falcon-7b", "falcon-40b", "falcon-rw", "llama"])
def test_scores_of_a_held_out_row_count_where_attention_makes_them(
    shape: str, attention: str, precision: Precision
) -> None:
    """Falcon-7B's shared key, eager attention and position biases take bytes for each head and each pair of tokens."""
    plan, length = SHAPES[shape](num_attention_heads=32, hidden_size=128), 512
    config = TrainConfig(precision=precision, data=DataConfig(max_length=length, eval_share=0.1))
    model = make_model(plan, attention).to(WEIGHT_DTYPES[precision])
    peak_bytes(model, 16)
    found, peak = held_out_bytes(config, model, attention), peak_bytes(model, length)
    # Logits are not in the peak; they are the most that is predicted where attention makes no scores.
    logits = 0 if attention == "eager" or shape in ("falcon-7b", "falcon-rw") else 3 * 4 * length * plan.vocab_size
    assert 0.9 * peak < found < 1.6 * peak + logits
    again = LoopConfig(grad_checkpointing=True)  # training keeps little beside it
    alone = dataclasses.replace(config, strategy="lora", model=ModelConfig(attention=attention), loop=again)
    told = predict(alone, plan, 1)
    assert told.activations + told.working >= found


def test_optimizer_bytes_are_those_that_it_holds() -> None:
    for strategy in ("ddp", "lora", "full-lowmem"):
        config = dataclasses.replace(SMALL, strategy=strategy)
        model = make_model(llama()).to(torch.bfloat16)
        made = make_strategy(config, World())
        made.ready(model)
        optimizer = made.make_optimizer(model)
        model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        optimizer.step()
        held = sum(tensor.nbytes for state in optimizer.state.values() for tensor in state.values())
        assert predict(config, llama(), 1).optimizer == held
        assert isinstance(optimizer, Adafactor) == (strategy == "full-lowmem")


def test_what_cannot_fit_is_refused_with_the_nearest_that_can() -> None:
    with pytest.raises(UserError, match=r'strategy "ddp" needs \d+\.\d GiB a host for 2 ranks.*; use fewer ranks'):
        check_fits(TrainConfig(), FalconConfig(), world_size=2, ranks=2, host=8 * GIB)
    for host, strategy in ((24, "full-lowmem"), (16, "lora")):
        with pytest.raises(UserError, match=f"; set strategy={strategy}$"):
            check_fits(TrainConfig(), FALCON_IN_BF16, world_size=1, ranks=1, host=host * GIB)
    lora = TrainConfig(strategy="lora")
    assert check_fits(lora, FALCON_IN_BF16, world_size=2, ranks=2, host=24 * GIB).total > 12 * GIB


def test_the_copy_that_is_made_where_there_is_room_counts_where_there_is() -> None:
    config, plan = TrainConfig(), llama()
    without = check_fits(_saving("off"), plan, world_size=2, ranks=2, host=64 * GIB)
    found = check_fits(config, plan, world_size=2, ranks=2, host=64 * GIB)
    assert found.snapshot == (found.weights + found.optimizer) // 2
    assert found == dataclasses.replace(without, snapshot=found.snapshot)
    tight = int((without.on_host(2) + found.snapshot) / 0.97)  # room for one of two copies
    assert check_fits(config, plan, world_size=2, ranks=2, host=tight) == without
    with pytest.raises(UserError, match=r"^strategy .ddp. needs"):
        check_fits(_saving("on"), plan, world_size=2, ranks=2, host=tight)
    low = dataclasses.replace(config, strategy="full-lowmem")
    assert predict(low, plan, 1).snapshot == 0


def _saving(background: Switch) -> TrainConfig:
    return TrainConfig(checkpoint=CheckpointConfig(background=background))


@pytest.mark.parametrize(
    ("kept", "precision", "mapped"),
    [
        (torch.bfloat16, "bf16", True),
        (torch.bfloat16, "fp32", False),
        (torch.bfloat16, "bf16-autocast", False),
        (torch.float16, "bf16", False),
        (torch.float32, "bf16", False),
        (torch.float32, "fp32", True),
    ],
)
def test_weights_of_their_files_dtype_are_mapped_and_not_read(
    tmp_path: Path, kept: torch.dtype, precision: Precision, mapped: bool
) -> None:
    model = make_model(llama()).to(kept)
    model.save_pretrained(tmp_path)
    told = ModelConfig(name=str(tmp_path))
    found = predict(TrainConfig(strategy="lora", precision=precision), load_config(tmp_path, told), 1)
    assert bool(found.mapped) == mapped
    loaded = load_model(tmp_path, told, precision)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    inside = [any(a <= param.data_ptr() < b for a, b in spans) for param in loaded.parameters()]
    assert all(inside) if mapped else not any(inside)


@pytest.mark.parametrize("memory", ["0", "-1", "nan", "inf"])
def test_no_host_has_so_much_memory(memory: str) -> None:
    with pytest.raises(UserError, match=f'^falcon estimate: --memory must be above 0 GiB: "{memory}"$'):
        estimate(["demo", "--memory", memory])


@pytest.fixture
def deepspeed_says_nothing(monkeypatch) -> None:
    """Imported for the first time, it would tell on stdout which accelerator it takes; the command keeps it quiet."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.usefixtures("deepspeed_says_nothing")
def test_estimate_tells_every_strategy_and_whether_the_one_asked_for_fits(tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'strategy = "lora"\n[model]\nname = "{write_model(tmp_path / "model")}"\n')
    assert estimate([str(recipe), "--memory", "0.5", "--format", "json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert next(row["strategy"] for row in told["strategies"]) == told["asked"] == "lora"
    assert estimate([str(recipe), "--memory", "64", "--nproc-per-node", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 ranks on each of 1 hosts of 64.0 GiB" in lines[0]
    assert lines[1].startswith("* lora")


@pytest.mark.usefixtures("deepspeed_says_nothing")
def test_strategies_that_a_model_or_a_precision_cannot_have_are_left_out(tmp_path: Path, capsys) -> None:
    Qwen2Config(
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        vocab_size=128,
        intermediate_size=64,
    ).save_pretrained(tmp_path / "model")
    recipe = tmp_path / "r.toml"
    recipe.write_text(f'precision = "bf16-autocast"\n[model]\nname = "{tmp_path / "model"}"\n')
    assert estimate([str(recipe), "--memory", "64", "--format", "json"]) == 0
    assert [row["strategy"] for row in json.loads(capsys.readouterr().out)["strategies"]] == ["ddp"]


def test_advice_is_such_that_can_be_followed() -> None:
    with pytest.raises(UserError) as error:
        check_fits(TrainConfig(precision="bf16-autocast"), FalconConfig(), world_size=1, ranks=1, host=64 * GIB)
    assert "full-lowmem" not in str(error.value)


def test_the_least_limit_of_the_cgroups_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("1073741824\n")
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(host_memory, "OWN", own)
    assert host_memory.total_bytes() == GIB
