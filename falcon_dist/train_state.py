"""What is kept of a run: weights as plain transformers reads them, optimizer state in safetensors, counters in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from falcon_dist import checkpoint, layout, tensor_file
from falcon_dist.checkpoint import TENSORS, TRAIN_STATE, DamagedError, told_of
from falcon_dist.contract import UserError
from falcon_dist.layout import Shard
from falcon_dist.tensor_file import Told

T = TypeVar("T")
COUNTERS: Final = f"{TRAIN_STATE}/counters.json"
OPTIMIZER: Final = f"{TRAIN_STATE}/optimizer"
INDEX: Final = "model.safetensors.index.json"
SHARD_BYTES: Final = 2 << 30
"""Optimizer files are cut at this size."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """The state of a run between two steps: the very tensors that are trained, by name."""

    weights: Mapping[str, torch.Tensor]
    """Under the names that plain transformers gives them, tied ones once."""
    optimizer: Mapping[str, torch.Tensor]
    """As "exp_avg/lm_head.weight"; empty where the optimizer is not kept."""
    steps: int
    """Updates that the optimizer has done."""
    describe: Callable[[Path], None]
    """Writes what says what the weights are: configuration, tokenizer."""
    stem: str = "model"
    """Weights are in STEM.safetensors, or in STEM-00001-of-00002.safetensors and so on."""
    in_one_file: bool = False
    """Who reads these weights knows of no second file."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and state, under different names."""
        return {**self.weights, **{f"{TRAIN_STATE}/{name}": tensor for name, tensor in self.optimizer.items()}}

    def shards(self, *, writers: int, max_bytes: int) -> tuple[Shard, ...]:
        """The files of a checkpoint; their tensors are named as in ``tensors``."""
        weights = {name: tensor.nbytes for name, tensor in self.weights.items()}
        state = {f"{TRAIN_STATE}/{name}": tensor.nbytes for name, tensor in self.optimizer.items()}
        whole = sum(weights.values())
        limits = (1, whole) if self.in_one_file else (writers, max_bytes)
        return (
            *layout.shards(weights, self.stem, writers=limits[0], max_bytes=limits[1]),
            *layout.shards(state, OPTIMIZER, writers=writers, max_bytes=SHARD_BYTES),
        )


def named_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The live weights as ``save_pretrained`` would name and order them."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    return dict(remove_tied_weights_from_state_dict(state, model))


def describe_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Configuration and tokenizer as ``save_pretrained`` writes them: it does so on rank 0 only, we on any."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_shards(
    folder: Path,
    shards: Iterable[Shard],
    tensors: Mapping[str, torch.Tensor],
    value_of: Callable[[str], torch.Tensor] | None = None,
) -> dict[str, Told]:
    """Writes these files; what each one is. ``value_of`` gives the values where ``tensors`` are on the meta device."""
    told = {}
    for shard in shards:
        path = folder / shard.name
        path.parent.mkdir(exist_ok=True)
        names = {name.removeprefix(f"{TRAIN_STATE}/"): tensors[name] for name in shard.tensors}
        values = (map(value_of, shard.tensors),) if value_of else ()
        told[shard.name] = tensor_file.write(path, names, *values)
    return told


def write_rest(folder: Path, kept: Kept, shards: Sequence[Shard]) -> None:
    """Everything beside the tensors: index, configuration, counters."""
    kept.describe(folder)
    files = [shard for shard in shards if not shard.name.startswith(TRAIN_STATE)]
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in kept.weights.values())},
            "weight_map": {name: shard.name for shard in files for name in shard.tensors},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    if kept.optimizer:
        (folder / TRAIN_STATE).mkdir(exist_ok=True)
        (folder / COUNTERS).write_text(json.dumps({"optimizer_steps": kept.steps}) + "\n")


def load(folder: Path, kept: Kept, get_on: Callable[[], None] = lambda: None) -> tuple[dict[str, torch.Tensor], int]:
    """Fills the kept weights from a checkpoint; the optimizer's state, in tensors of its own, and its steps.

    What is read is hashed on the way and compared with the manifest, so that nothing has to be read twice.
    ``get_on`` is called after each file, here and below: a sign for those who wait.

    Raises:
        DamagedError: a file is not what was written; the weights may be half filled.
        UserError: the checkpoint was saved without the optimizer; a fresh one would train something else. Or a
            file of it is not what its name says.
    """
    steps = optimizer_steps(folder)
    fill(folder, kept, get_on)
    state: dict[str, torch.Tensor] = {}
    for part in optimizer_parts(folder, get_on):
        state |= part
    return state, steps


def optimizer_steps(folder: Path) -> int:
    """Updates that the optimizer had done; raises as ``load`` does."""
    _, files = checkpoint.read_manifest(folder)
    if COUNTERS not in files:
        raise UserError(f'--resume: "{folder}" {checkpoint.NO_STATE}')
    counters = _read(folder, COUNTERS, files[COUNTERS], _counters)
    return int(counters["optimizer_steps"])


def _counters(path: Path, kind: str) -> tuple[dict[str, int], Told]:
    return json.loads(path.read_bytes()), told_of(path, kind)


def optimizer_parts(folder: Path, get_on: Callable[[], None] = lambda: None) -> Iterator[dict[str, torch.Tensor]]:
    """The optimizer's state, a file at a time; raises as ``load`` does."""
    _, files = checkpoint.read_manifest(folder)
    for name in sorted(name for name in files if name.startswith(OPTIMIZER)):
        yield _read(folder, name, files[name], tensor_file.read)
        get_on()


def _read(folder: Path, name: str, told: Told, read: Callable[[Path, str], tuple[T, Told]]) -> T:
    """What ``read`` makes of a file and its kind of hash; its bytes have to be those that were written."""
    try:
        content, found = read(folder / name, told.kind)
    except OSError as error:  # also where it could be read the next time: an older one is better than none
        why = checkpoint.file_fault(folder, name, told) or checkpoint.unreadable(name, error)
        raise DamagedError(why) from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, MemoryError) as error:
        if fault := checkpoint.file_fault(folder, name, told):
            raise DamagedError(fault) from error
        raise UserError(f'--resume: "{folder / name}" cannot be used: {error}') from error
    if found != told:
        raise DamagedError(checkpoint.other_bytes(name, told))
    return content


@torch.no_grad()
def fill(folder: Path, kept: Kept, get_on: Callable[[], None] = lambda: None) -> None:
    """Gives the kept weights a checkpoint's values; raises as ``load`` does."""
    _, files = checkpoint.read_manifest(folder)
    missing = dict(kept.weights)

    def take(path: Path, kind: str) -> tuple[None, Told]:
        names = tensor_file.names_in(path)
        if odd := sorted(set(names) - set(missing)):
            raise ValueError(f'weights do not fit the model: unexpected "{odd[0]}"')
        return None, tensor_file.read_into(path, {name: missing.pop(name) for name in names}, kind)

    for name in sorted(name for name in files if name.startswith(kept.stem) and name.endswith(TENSORS)):
        _read(folder, name, files[name], take)
        get_on()
    if missing:
        raise UserError(f'--resume: "{folder}": weights do not fit the model: no "{min(missing)}"')


def parameter_names(model: PreTrainedModel) -> dict[torch.Tensor, str]:
    """Each trained parameter's name; a tied one has its first."""
    return {param: name for name, param in model.named_parameters() if param.requires_grad}
