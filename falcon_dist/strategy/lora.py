"""Low-rank adapters by peft: the weights stay as they are, and only small matrices beside them are trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch
from peft import LoraConfig as PeftLoraConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falcon_dist import train_state
from falcon_dist.config import LoraConfig, StrategyName
from falcon_dist.contract import UserError
from falcon_dist.engine.named import NamedOptimizer
from falcon_dist.strategy.replicated import Replicated
from falcon_dist.train_state import Kept

WEIGHTS_FILE: Final = "adapter_model.safetensors"
ATTENTION_LAYERS: Final[dict[str, tuple[str, ...]]] = {
    "falcon": ("query_key_value",),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
"""What gets an adapter where lora.targets names nothing."""


class Lora(Replicated):
    """strategy="lora": every rank holds the frozen weights, shared with others of its host, and trains adapters."""

    name: StrategyName = "lora"

    def ready(self, model: PreTrainedModel) -> None:
        """Adds adapters, B = 0, in the dtype of the weights; everything else is frozen."""
        super().ready(model)
        targets = targets_of(model, self.config.lora)
        torch.manual_seed(self.config.seed)
        model.add_adapter(_peft_config(self.config.lora, targets, self.config.model.revision))
        # DDP sends all it knows of from rank 0 at start: frozen weights would be written, and no longer be shared.
        frozen = [name for name, param in model.named_parameters() if not param.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # type: ignore[no-untyped-call]

    def kept(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, optimizer: NamedOptimizer) -> Kept:
        """Adapters under the names of peft's files, which leave out the "default" that they have in a model."""
        trained = train_state.parameter_names(model)
        return Kept(
            weights={f"base_model.model.{name.replace('.default.', '.')}": param for param, name in trained.items()},
            optimizer=self.kept_state(model, optimizer),
            steps=optimizer.steps,
            describe=partial(_describe, model, tokenizer),
            stem=WEIGHTS_FILE.removesuffix(".safetensors"),
            in_one_file=True,
        )


def _describe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    config: PeftLoraConfig = model.peft_config[model.active_adapters()[0]]
    config.save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)


def _peft_config(lora: LoraConfig, targets: Sequence[str], revision: str | None) -> PeftLoraConfig:
    return PeftLoraConfig(
        revision=revision,  # of the model, where it is a hub's
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(targets),
    )


def targets_of(model: PreTrainedModel, lora: LoraConfig) -> tuple[str, ...]:
    """Names of the layers that get an adapter.

    Raises:
        UserError: a name is of no linear layer, or there is none for this kind of model.
    """
    head = model.get_output_embeddings()
    layers = [n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    known = sorted({*layers})
    targets = lora.targets or ATTENTION_LAYERS.get(model.config.model_type, ())
    if not targets:
        raise UserError(
            f'lora.targets: which layers? none are known for "{model.config.model_type}"; it has {", ".join(known)}'
        )
    for name in targets:
        if name not in known:
            raise UserError(f'lora.targets: the model has no such linear layer: "{name}"; it has {", ".join(known)}')
    return tuple(targets)


def trained_parameters(model: PreTrainedModel, lora: LoraConfig) -> int:
    """Parameters of the adapters that ``ready`` would add; the model may be on the meta device."""
    targets = targets_of(model, lora)
    found = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets]
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in found)
