"""The state of a run beside its weights: optimizer shards in safetensors, counters in JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falcon_dist.checkpoint import TRAIN_STATE
from falcon_dist.contract import UserError
from falcon_dist.engine.named import NamedOptimizer

COUNTERS: Final = "counters.json"
SHARD_BYTES: Final = 2 << 30
"""Optimizer files are cut at this size: safetensors copies a file's tensors once while it writes."""


def save_weights(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_shard_size: str) -> None:
    """Weights, config and tokenizer as plain transformers reads them."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)


def save_optimizer(folder: Path, model: PreTrainedModel, optimizer: NamedOptimizer) -> None:
    """The optimizer's state under parameter names, bit for bit."""
    state_dir = folder / TRAIN_STATE
    state_dir.mkdir()
    state = optimizer.named_state(parameter_names(model))
    for number, shard in enumerate(_shards(state), start=1):
        save_file(shard, state_dir / f"optimizer-{number:05d}.safetensors")
    (state_dir / COUNTERS).write_text(json.dumps({"optimizer_steps": optimizer.steps}) + "\n")


def _shards(state: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in state.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
    yield shard


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Puts a checkpoint's weights into a model of the same shape, bit for bit."""
    weights = _tensors(sorted(folder.glob("model*.safetensors")))
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"{folder}: weights do not fit the model: missing {missing}, unexpected {unexpected}")


def load_optimizer(folder: Path, model: PreTrainedModel, optimizer: NamedOptimizer) -> None:
    """Gives the optimizer the state that ``save_optimizer`` kept.

    Raises:
        UserError: the checkpoint was saved without it; going on with a fresh one would train something else.
    """
    if not (folder / TRAIN_STATE / COUNTERS).is_file():
        raise UserError(f'--resume: "{folder}" has no optimizer state; it was saved with checkpoint.optimizer=false')
    state = _tensors(sorted((folder / TRAIN_STATE).glob("optimizer-*.safetensors")))
    counters = json.loads((folder / TRAIN_STATE / COUNTERS).read_text())
    optimizer.load_named_state(parameter_names(model), state, counters["optimizer_steps"])


def _tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 - not a dict
    return tensors


def parameter_names(model: PreTrainedModel) -> dict[torch.Tensor, str]:
    """Each trained parameter's name; a tied one has its first."""
    return {param: name for name, param in model.named_parameters() if param.requires_grad}
