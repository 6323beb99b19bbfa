"""Whether a model of a family that was not compared can be trained on packed rows: tried on a small one of its kind."""

from __future__ import annotations

import copy
from typing import Final

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from falcon_dist.config import TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.form import FAMILIES, plain_attention
from falcon_dist.masking import leak

VOCABULARY: Final = 256
LENGTH: Final = 32
NOISE: Final = 1e-3
"""Logits of about 1 move by 1e-6 where experts get other tokens beside the same ones, by 1 where they leak."""


def check_model(config: TrainConfig, plan: PreTrainedConfig) -> None:
    """Looks whether this architecture takes our masks and positions, and whether they do what they are for.

    Raises:
        UserError: it does not, or rows are longer than its window, or packed samples see each other.
    """
    if plan.model_type in FAMILIES:
        return
    _check_window(plan, config.data.max_length)
    try:
        moved = leak(_small(plan, plain_attention(plan, config.model.attention)), length=LENGTH, batch=2)
    except Exception as error:  # whatever transformers' code says of what it was not made for
        told = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"model.name: models of this kind ({plan.model_type}) do not run with the masks of packed rows ({told}): "
            f'"{config.model.name}"; take one of another kind'
        ) from error
    if moved > NOISE and config.data.packing_kind != "off":
        raise UserError(
            f'data.packing: "{plan.model_type}" carries on what it read where no mask stops it and would let packed '
            "samples see each other; set data.packing=false"
        )


def _check_window(plan: PreTrainedConfig, max_length: int) -> None:
    """Our mask is the whole mask: a layer that looks only so far back would look at all of its row."""
    text = plan.get_text_config()
    for kind, name in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
        window, kinds = getattr(text, name, None), getattr(text, "layer_types", None)
        if window and window < max_length and (kinds is None or kind in kinds):
            raise UserError(
                f'data.max_length: "{plan.model_type}" looks back {window} tokens, but at all of a row while training: '
                f'"{max_length}"; set data.max_length={window}, or take a model without such a window'
            )


def _small(plan: PreTrainedConfig, attention: str) -> PreTrainedModel:
    """A model with the first layers of this one, as many as it takes to have every kind of them, and few words."""
    plan = copy.deepcopy(plan)
    text = plan.get_text_config()
    with torch.device("meta"):
        count = _layers_of_all_kinds(AutoModelForCausalLM.from_config(plan), text)
    if isinstance(kinds := vars(text).get("layer_types"), list):  # elsewhere it is told from other numbers
        text.layer_types = kinds[:count]
    text.num_hidden_layers, text.vocab_size = count, VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(plan, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim >= 2:  # those of a fresh model are so small that a leak would drown in them
                param.normal_(0, param.shape[-1] ** -0.5)
    return model.eval()


def _layers_of_all_kinds(model: PreTrainedModel, text: PreTrainedConfig) -> int:
    """The first so many layers have every kind of module that any layer has."""
    count = int(text.num_hidden_layers)
    stacks = [stack for stack in model.modules() if isinstance(stack, nn.ModuleList) and len(stack) == count]
    seen: set[type] = set()
    last = min(1, count - 1)  # rwkv cannot have one alone
    for stack in stacks:
        for number, layer in enumerate(stack):
            found = {type(module) for module in layer.modules()}
            if found - seen:
                last = max(last, number)
            seen |= found
    return last + 1 if stacks else count
