"""Weights that text never uses, as the eyes of a model that also sees: they cost neither the others nor a resume."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import SHAPES, VOCAB, make_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, Gemma3Config, PreTrainedModel

from falcon_dist.config import LoraConfig, StrategyName, TrainConfig
from falcon_dist.engine.adamw import MasterAdamW
from falcon_dist.process_group import open_group
from falcon_dist.strategy.choice import make_strategy
from falcon_dist.train_state import parameter_names
from falcon_dist.world import World


def seeing() -> PreTrainedModel:
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"vocab_size": VOCAB, "hidden_size": 32, "num_key_value_heads": 2, "head_dim": 16, **heads}
    vision = {"hidden_size": 32, "image_size": 28, "patch_size": 14, **heads}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def backward(model: torch.nn.Module) -> None:
    ids = torch.arange(8)[None]
    model(input_ids=ids, token_type_ids=torch.zeros_like(ids), labels=ids).loss.backward()


@pytest.mark.parametrize("strategy", ["ddp", "lora"])
def test_ranks_do_not_wait_for_gradients_that_never_come(strategy: StrategyName) -> None:
    """DDP would refuse the second step, when the first one was taken with gradients that were not averaged."""
    made = make_strategy(TrainConfig(strategy=strategy, lora=LoraConfig(targets=("q_proj",))), World())
    model = seeing()
    made.ready(model)
    with open_group(World(), {}):
        wrapped = DistributedDataParallel(
            model, find_unused_parameters=made.settings().get("ddp_find_unused_parameters", False)
        )
        for _ in range(2):
            backward(wrapped)
    del wrapped
    for name, param in model.named_parameters():
        if param.requires_grad:
            assert (param.grad is None) == ("vision" in name or "projector" in name), name


@pytest.mark.parametrize("shape", SHAPES)
def test_families_that_use_all_they_have_are_not_searched(shape: str) -> None:
    made = make_strategy(TrainConfig(), World())
    made.ready(make_model(SHAPES[shape]()))
    assert made.settings() == {}


def test_a_resumed_run_steps_them_as_one_that_was_never_stopped() -> None:
    model = seeing().to(torch.bfloat16)
    before = make_strategy(TrainConfig(), World()).make_optimizer(model)
    backward(model)
    before.step()
    again = copy.deepcopy(model)
    after = make_strategy(TrainConfig(), World()).make_optimizer(again)
    kept = {name: tensor.clone() for name, tensor in before.named_state(parameter_names(model)).items()}
    assert not any("vision" in name for name in kept)
    after.load_named_state(parameter_names(again), kept, before.steps)
    for one, optimizer in ((model, before), (again, after)):
        for param in one.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_half_a_parameters_state_is_no_state() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = MasterAdamW([{"params": [weight]}], lr=1e-3)
    with pytest.raises(KeyError, match="exp_avg/w"):
        optimizer.load_named_state({weight: "w"}, {"master/w": torch.ones(2, 2)}, 1)
