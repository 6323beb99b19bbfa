"""``falcon merge ADAPTER --into FOLDER``: a plain model with the adapters of a LoRA run added to its weights."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel

from falcon_dist import checkpoint, tensor_file
from falcon_dist.config import ModelConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.foreign import check_weights, reason
from falcon_dist.engine.native import ADAPTER_CONFIG, base_and_commit, load_model, load_tokenizer
from falcon_dist.identity import check_base
from falcon_dist.layout import parse_size
from falcon_dist.prepare import find_model
from falcon_dist.strategy.lora import WEIGHTS_FILE

LORA: Final = "lora_"
"""In the name of every tensor of an adapter."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The verb's own flags."""
    parser = argparse.ArgumentParser(prog="falcon merge", description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("adapter", type=Path, help="a checkpoint folder of a LoRA run")
    flag("--into", type=Path, required=True, metavar="FOLDER", help="the folder to make")
    flag("--base", metavar="MODEL", help="the model they were trained on, where it is no longer at its place")
    flag("--precision", choices=("bf16", "fp32"), default="bf16", help="of the weights written (bf16)")
    flag("--max-shard-size", default="5GB", help="largest weights file (5GB)")
    return parser.parse_args(argv)


def merge(argv: Sequence[str]) -> int:
    """Loads both, adds B A x alpha / rank to each adapted weight, and writes what plain transformers loads.

    Raises:
        UserError: there are no adapters, they do not verify or fit, their model cannot be had or is another, or FOLDER
            exists or cannot be written.
    """
    args = parse_args(argv)
    parse_size(args.max_shard_size, "falcon merge: --max-shard-size")
    args.adapter = args.adapter.resolve()  # a link such as "best" may be turned to another checkpoint meanwhile
    facts = _facts_of(args.adapter)
    if os.path.lexists(args.into):  # unlike Path.exists it leaves a name that cannot be made to who makes it
        raise UserError(f'falcon merge: "{args.into}" exists already; name a new folder')
    config = _base(args)
    place = find_model(config)
    check_base(args.adapter, dataclasses.replace(config, name=place))
    merged = _merged(load_model(place, config, args.precision), args.adapter, config.name)
    tokenizer = load_tokenizer(args.adapter, config)
    told = {**facts, "merged": str(args.adapter), "made_from": config.name}
    with checkpoint.written(args.into.absolute(), told) as folder:
        merged.save_pretrained(folder, max_shard_size=args.max_shard_size)
        tokenizer.save_pretrained(folder)
    print(f"{config.name} with {args.adapter}: {args.into}")
    return 0


def _base(args: argparse.Namespace) -> ModelConfig:
    """The model they were trained on, at the commit they tell; or the one that is named instead."""
    name, commit = base_and_commit(args.adapter)
    return ModelConfig(name=args.base or name, revision=commit if args.base in (None, name) else None)


def _facts_of(adapter: Path) -> dict[str, Any]:
    """What the checkpoint's manifest tells of its run, its bytes verified; nothing for adapters of others."""
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise UserError(f'falcon merge: no {ADAPTER_CONFIG} in "{adapter}"; give a checkpoint of a LoRA run')
    check_weights(adapter)
    if not (adapter / WEIGHTS_FILE).is_file():  # peft would take a pickle instead, or look on the hub
        raise UserError(f'falcon merge: no {WEIGHTS_FILE} in "{adapter}"; fetch or save the adapters again')
    if not (adapter / checkpoint.MANIFEST).is_file():
        return {"step": 0}
    fault = checkpoint.fault_of(adapter)
    if fault:
        raise UserError(f'falcon merge: "{adapter}" cannot be trusted: {fault}')
    return dict(checkpoint.read(adapter).facts)


def _merged(base: PreTrainedModel, adapter: Path, name: str) -> PreTrainedModel:
    """The base model with the adapters in its weights; safe_merge refuses those that are not numbers."""
    try:
        model = PeftModel.from_pretrained(base, adapter)
        _check_names(model, adapter / WEIGHTS_FILE)
        return model.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, ImportError, SafetensorError) as error:
        raise UserError(
            f'falcon merge: cannot add "{adapter}" to "{name}": {_why(adapter, error)}; give whole adapters, and with '
            "--base the model they were trained on"
        ) from error


def _check_names(model: PeftModel, file: Path) -> None:
    """peft passes over adapters that have no place in the model, and leaves places without any as they are.

    Raises:
        ValueError: there are such, as where the model has another number of layers.
    """
    places = {name for name in get_peft_model_state_dict(model, save_embedding_layers=False) if LORA in name}
    given = {name for name in tensor_file.names_in(file) if LORA in name}
    if odd := sorted(places ^ given):
        raise ValueError(f'"{odd[0]}" is in the {"adapters" if odd[0] in given else "model"} only')


def _why(adapter: Path, error: Exception) -> str:
    """torch's first line is a headline: the first tensor that does not fit stands below it."""
    first, below = reason(adapter, error), str(error).strip().splitlines()[1:2]
    return " ".join([first, *(line.strip() for line in below)]) if first.endswith(":") else first
