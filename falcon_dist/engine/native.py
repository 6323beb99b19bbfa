"""The native engine: stock transformers classes on upstream torch, dtype and attention chosen explicitly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from falcon_dist.config import ModelConfig, Precision
from falcon_dist.contract import UserError
from falcon_dist.engine import foreign, widened
from falcon_dist.engine.attention import SEGMENTS, register
from falcon_dist.engine.form import FAMILIES, plain_attention

ADAPTER_CONFIG: Final = "adapter_config.json"
"""What peft writes beside adapters."""
WEIGHT_DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "bf16-autocast": torch.float32,
    "fp32": torch.float32,
}


def load_model(source: Path | str, config: ModelConfig, precision: Precision) -> PreTrainedModel:
    """The model with its weights in the precision's dtype, in training mode and in plain form (see form.py).

    A folder of adapters gives the model they were trained on with them beside its layers. Where the processor does not
    multiply bf16, this process does from here on as widened.py says.

    Raises:
        UserError: there is no such model, or its files do not load, or are such as could run code; or it is not the
            one that adapters were trained on.
    """
    widened.install()
    base, commit = base_and_commit(source)
    for place in (source, base):
        foreign.check_weights(place)
    if base != str(source):
        from falcon_dist.identity import check_base

        check_base(source, ModelConfig(name=base, revision=commit))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=WEIGHT_DTYPES[precision],
            revision=_revision(source, config),
            attn_implementation=_attention(source, config),
            use_safetensors=True,
            trust_remote_code=False,  # left out, it asks at the terminal
        )
    except (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f'model.name: cannot load "{source}": {foreign.reason(source, error)}') from error
    if getattr(model, "hf_quantizer", None) is not None:
        from falcon_dist.weight_only import ready

        if precision != "bf16":
            raise UserError(f'precision: quantised weights run in bf16 only: "{precision}"; take another precision')
        ready(model)
    model.config._attn_implementation = plain_attention(model.config, config.attention)
    model.train()
    return model


def stay_in_place(model: PreTrainedModel) -> None:
    """Makes ``model.to`` a CPU do nothing.

    In a group of ranks the trainer moves its model to "cpu:0", "cpu:1", ...: to torch other devices than "cpu", so
    that every weight would be copied, and none be shared with the host's other ranks any more.
    """
    move = model.to

    def to(*args: Any, **kwargs: Any) -> Any:
        stays = not kwargs and len(args) == 1 and isinstance(args[0], torch.device) and args[0].type == "cpu"
        return model if stays else move(*args, **kwargs)

    model.to = to


def base_of(source: Path | str) -> str:
    """The model that a folder of adapters was trained on; any other model is its own.

    Raises:
        UserError: the adapters do not tell.
    """
    return base_and_commit(source)[0]


def base_and_commit(source: Path | str) -> tuple[str, str | None]:
    """``base_of`` and, where that is a hub name, the commit that adapters were trained on if they tell it.

    Raises:
        UserError: the adapters do not tell.
    """
    told = Path(source) / ADAPTER_CONFIG
    if not told.is_file():
        return str(source), None
    try:
        values = json.loads(told.read_text())
        return str(values["base_model_name_or_path"]), values.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{told}: does not name the model it was trained on") from error


def _attention(source: Path | str, config: ModelConfig) -> str:
    """The attention whose modules are made; those of segments know the plain way too."""
    register()
    plan = load_config(source, config)
    segments = config.attention == SEGMENTS or (config.attention == "auto" and plan.model_type in FAMILIES)
    return SEGMENTS if segments else plain_attention(plan, config.attention)


def load_tokenizer(source: Path | str, config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        UserError: there is none, or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(source), revision=_revision(source, config), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f'model.name: cannot load the tokenizer of "{source}": {foreign.reason(source, error)}'
        ) from error
    if tokenizer.eos_token is None:
        raise UserError(
            f'model.name: no end-of-text token in the tokenizer of "{source}"; name one as "eos_token" in its '
            "tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(source: Path | str, config: ModelConfig) -> PreTrainedConfig:
    """The model's architecture; no weight is read.

    Raises:
        UserError: there is no such model.
    """
    try:
        return AutoConfig.from_pretrained(base_of(source), revision=_revision(source, config), trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise UserError(f'model.name: cannot load "{source}": {foreign.reason(source, error)}') from error


def count_parameters(plan: PreTrainedConfig) -> int:
    """Parameters of a model of this architecture, tied ones once, without making any."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(plan)
    return sum(p.numel() for p in model.parameters())


def _revision(source: Path | str, config: ModelConfig) -> str:
    """What is read of a hub name; given adapters, transformers looks for their model's there."""
    if commit := base_and_commit(source)[1]:
        return commit
    return "main" if Path(source).exists() else config.revision or "main"
