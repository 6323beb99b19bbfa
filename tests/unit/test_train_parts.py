"""Loss, optimizer, schedule, evaluation arithmetic, configuration and memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import llama, make_model
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerControl, TrainerState, TrainingArguments

from falcon_dist import settings
from falcon_dist.config import OptimConfig, ReportConfig, TrainConfig, build, check_known, flatten, keys_of
from falcon_dist.contract import UserError
from falcon_dist.engine.adamw import MasterAdamW, decayed_groups
from falcon_dist.evaluate import ratio
from falcon_dist.learning_rate import learning_rate_factor
from falcon_dist.loss import PIECE_BYTES, count_labels, token_losses
from falcon_dist.tracking import TENSORBOARD_FOLDER, evaluation_logs, trackers
from falcon_dist.train_state import parameter_names
from falcon_dist.world import World


def test_loss_is_cross_entropy_of_the_next_token() -> None:
    logits = torch.randn(2, 5, 7)
    labels = torch.tensor([[1, 2, -100, 3, 4], [0, -100, -100, 6, 5]])
    losses = token_losses(logits, labels)
    expected = -logits[0, 0].log_softmax(-1)[2]
    assert torch.isclose(losses[0, 0], expected)
    assert losses[1, 0] == 0.0
    assert count_labels(labels) == 5
    assert losses.count_nonzero() == 5


def test_losses_without_a_gradient_are_the_same_and_take_a_piece_at_a_time() -> None:
    logits, labels = torch.randn(1, 600, 30_001, dtype=torch.bfloat16), torch.randint(0, 30_001, (1, 600))
    labels[0, 7:60] = -100
    whole = token_losses(logits.clone().requires_grad_(), labels)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        losses = token_losses(logits, labels)
    assert torch.equal(losses, whole)
    assert 0 < max(event.self_cpu_memory_usage for event in profiled.events()) <= PIECE_BYTES < logits.nbytes


def trained(dtype: torch.dtype, steps: int) -> tuple[torch.nn.Module, MasterAdamW]:
    model = make_model(llama()).to(dtype)
    optimizer = MasterAdamW(decayed_groups(model.named_parameters(), 0.1), lr=1e-3)
    run_steps(model, optimizer, range(steps))
    return model, optimizer


def run_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()


def test_fp32_steps_equal_torch_adamw() -> None:
    ours, _ = trained(torch.float32, 5)
    theirs = make_model(llama())
    reference = torch.optim.AdamW(decayed_groups(theirs.named_parameters(), 0.1), lr=1e-3)
    run_steps(theirs, reference, range(5))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_bf16_weights_are_the_rounded_fp32_master() -> None:
    model, optimizer = trained(torch.bfloat16, 3)
    for param in model.parameters():
        state = optimizer.state[param]
        assert {s.dtype for s in state.values()} == {torch.float32}
        assert torch.equal(state["master"].to(torch.bfloat16), param)
        assert not torch.equal(state["master"], param.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", ["named", "torch"])
def test_state_goes_on_bit_for_bit(dtype: torch.dtype, way: str) -> None:
    whole, _ = trained(dtype, 6)
    half, before = trained(dtype, 3)
    after = MasterAdamW(decayed_groups(half.named_parameters(), 0.1), lr=1e-3)
    if way == "named":
        after.load_named_state(parameter_names(half), before.named_state(parameter_names(half)), before.steps)
    else:
        # accelerate does this to every optimizer it wraps
        after.load_state_dict(before.state_dict())
        after.steps = before.steps
    run_steps(half, after, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))


def test_vectors_do_not_decay() -> None:
    model = make_model(llama())
    matrices, vectors = decayed_groups(model.named_parameters(), 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert len(vectors["params"]) == 2 * 2 + 1


def test_learning_rate_warms_up_then_falls_to_zero() -> None:
    factor = learning_rate_factor(OptimConfig(warmup_steps=4), 20)
    assert [factor(s) for s in range(4)] == [0.2, 0.4, 0.6, 0.8]
    assert factor(4) == 1.0
    assert factor(12) == 0.5
    assert factor(20) == 0.0
    shared = learning_rate_factor(OptimConfig(warmup_share=0.2), 20)
    assert [shared(s) for s in range(21)] == [factor(s) for s in range(21)]
    assert learning_rate_factor(OptimConfig(schedule="cosine"), 10)(5) == pytest.approx(0.5)
    assert learning_rate_factor(OptimConfig(schedule="constant"), 10)(9) == 1.0


def test_standard_error_is_over_records() -> None:
    losses, tokens = torch.tensor([10.0, 30.0, 0.0]).double(), torch.tensor([10.0, 10.0, 0.0]).double()
    result = ratio(losses, tokens)
    assert (result.loss, result.tokens, result.records) == (2.0, 20, 2)
    # two records of means 1 and 3: standard deviation sqrt(2), over sqrt(2) records
    assert result.standard_error == pytest.approx(1.0)
    assert result.perplexity == pytest.approx(math.exp(2))


def test_a_perplexity_that_no_float_holds_is_infinite_and_null_in_json() -> None:
    result = ratio(torch.tensor([7100.0]).double(), torch.tensor([10.0]).double())
    assert result.perplexity == math.inf
    assert ", perplexity inf (" in str(result)
    figures = {"held_out": result.as_dict()}
    assert json.loads(json.dumps(figures, allow_nan=False))["held_out"]["perplexity"] is None
    assert evaluation_logs(figures) == {"eval_loss": 710.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"nmae": "x"}}, 'a.toml: unknown key "data.nmae"; did you mean "data.name"?'),
        ({"lr": 1}, 'a.toml: unknown key "lr"; did you mean "optim.lr"?'),
        ({"precision": "fp16"}, 'a.toml: precision must be "bf16" or "bf16-autocast" or "fp32": "fp16"'),
        ({"loop": {"max_steps": "ten"}}, 'a.toml: loop.max_steps must be a whole number or "none": "ten"'),
        ({"evaluate": {"prompts": [1]}}, "a.toml: evaluate.prompts must be a list of texts"),
        ({"data": {"packing": "maybe"}}, 'a.toml: data.packing must be true or false or "wrapped" or "best-fit" or'),
    ],
)
def test_configuration_errors_name_source_key_and_cure(values: dict[str, object], message: str) -> None:
    flat = flatten(values, "a.toml")
    with pytest.raises(UserError) as error:
        check_known(flat, keys_of(TrainConfig))
        build(TrainConfig, flat)
    assert message in str(error.value)


def test_configuration_takes_what_fits() -> None:
    values = {"optim": {"lr": 1}, "data": {"packing": "True"}, "loop": {"max_steps": "none"}, "seed": 7}
    config = build(TrainConfig, flatten(values, "a.toml"))
    assert (config.optim.lr, config.data.packing, config.loop.max_steps, config.seed) == (1.0, True, None, 7)


def test_a_recipe_may_hold_what_only_the_launcher_reads(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('seed = 7\n[launch]\nnnodes = 2\n[slurm]\npartition = "x"\n')
    assert settings.load(str(recipe)).seed == 7


ENV = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_world_from_environment() -> None:
    assert World.from_env({}) == World()
    assert World.from_env(ENV) == World(rank=1, world_size=2, local_rank=1, local_world_size=2)
    with pytest.raises(UserError, match='RANK must be from 0 to 1: "2"'):
        World.from_env({**ENV, "RANK": "2"})
    with pytest.raises(UserError, match='LOCAL_RANK must be a whole number: ""'):
        World.from_env({k: v for k, v in ENV.items() if k != "LOCAL_RANK"})


def test_steps_that_are_done_again_stand_in_the_curve_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args, control = TrainingArguments(output_dir=str(tmp_path)), TrainerControl()
    for start, last, loss in ((0, 9, 3.0), (6, 8, 2.0)):
        (tracker,) = trackers(ReportConfig(to=("tensorboard",)), tmp_path, start)
        for step in range(1, last - start + 1):
            tracker.on_log(args, TrainerState(global_step=step), control, logs={"loss": loss})
        tracker.on_train_end(args, TrainerState(), control)
    reader = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER))
    reader.Reload()
    curve = [(told.step, told.value) for told in reader.Scalars("train/loss")]
    assert curve == [*((step, 3.0) for step in range(1, 7)), (7, 2.0), (8, 2.0)]
