"""``falcon quantize MODEL OUT --bits 8|4``: a checkpoint with int8 or int4 weights, for inference."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from falcon_dist import checkpoint
from falcon_dist.config import ModelConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.native import ADAPTER_CONFIG, load_model, load_tokenizer
from falcon_dist.layout import parse_size
from falcon_dist.prepare import find_model
from falcon_dist.weight_only import Kind, disk_settings, quantize_layers, weight_bytes

KINDS: Final[dict[int, Kind]] = {8: "int8", 4: "int4"}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The verb's own flags."""
    parser = argparse.ArgumentParser(prog="falcon quantize", description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("model", help="a checkpoint folder (of a LoRA run: merged), or any model's folder or hub name")
    flag("out", type=Path, help="the folder to make, as runs/RUN/quantized/int8")
    flag("--bits", type=int, choices=tuple(KINDS), required=True, help="of a weight")
    flag("--max-shard-size", default="5GB", help="largest weights file (5GB)")
    return parser.parse_args(argv)


def quantize(argv: Sequence[str]) -> int:
    """Reads the model in bf16, rounds the weights of its linear layers and writes them.

    Raises:
        UserError: the checkpoint does not verify or is adapters, there is no such model, or OUT exists or cannot be
            written.
    """
    args = parse_args(argv)
    parse_size(args.max_shard_size, "falcon quantize: --max-shard-size")
    out, kind = args.out.absolute(), KINDS[args.bits]
    if os.path.lexists(out):  # unlike Path.exists it leaves a name that cannot be made to who makes it
        raise UserError(f'falcon quantize: "{args.out}" exists already; name a new folder')
    source = _place_of(args.model)
    facts = _facts_of(source)
    config = ModelConfig(name=source)
    place = find_model(config)
    _check_whole(place)
    model, tokenizer = load_model(place, config, "bf16").eval(), load_tokenizer(place, config)
    before, done = weight_bytes(model), quantize_layers(model, kind)
    _say_in_config(model, kind, done.left)
    with checkpoint.written(out, {**facts, "quantized": kind, "made_from": source}) as folder:
        _save(folder, model, tokenizer, args.max_shard_size)
    print(f"{done.layers} layers in {kind}, {len(done.left)} left in bf16 besides the embeddings and the head")
    for name in done.left:
        print(f"  left, not a multiple of 32 wide and high: {name}")
    print(f"weights: {before / 2**20:,.1f} MiB -> {weight_bytes(model) / 2**20:,.1f} MiB: {args.out}")
    return 0


def _place_of(model: str) -> str:
    """A folder without links: a run that trains may turn its "best" to another checkpoint than was verified."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.is_dir() else model


def _facts_of(model: str) -> dict[str, Any]:
    """What the checkpoint's manifest tells of its run, its bytes verified; nothing for a model of another kind."""
    path = Path(model)
    if not (path / checkpoint.MANIFEST).is_file():
        return {"step": 0}
    fault = checkpoint.fault_of(path)
    if fault:
        raise UserError(f'falcon quantize: "{model}" cannot be trusted: {fault}')
    return dict(checkpoint.read(path).facts)


def _check_whole(place: str) -> None:
    """Of a model with adapters transformers would write the adapters alone."""
    if (Path(place) / ADAPTER_CONFIG).is_file():
        raise UserError(
            f'falcon quantize: adapters without their model: "{place}"; run falcon merge {place} --into FOLDER '
            "first and quantise that"
        )


def _say_in_config(model: PreTrainedModel, kind: Kind, left: Sequence[str]) -> None:
    """Lets transformers write torchao's form, and read it again."""
    from transformers import TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    settings = TorchAoConfig(disk_settings(kind), modules_to_not_convert=[*head, *left])
    model.config.quantization_config = settings
    model.hf_quantizer = AutoHfQuantizer.from_config(settings)


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_shard_size: str) -> None:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
