"""``falcon estimate``: memory that a run will need at most, by strategy, before anything is loaded."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from falcon_dist.agreement import check_agreement
from falcon_dist.config import TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.native import load_config
from falcon_dist.host_memory import total_bytes
from falcon_dist.prepare import find_model
from falcon_dist.settings import default_source, load
from falcon_dist.strategy.memory import GIB, NEAREST, RankMemory, on_host_of, predict, usable
from falcon_dist.trial import check_model


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The verb's own flags."""
    parser = argparse.ArgumentParser(prog="falcon estimate", description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("run", nargs="?", help="a recipe, a run folder or its config.json (demo, unless --set names model or data)")
    flag("--set", action="append", default=[], metavar="KEY=VALUE", dest="sets", help="a training setting")
    ranks = "ranks of a host (1; falcon-launch starts one for each NUMA node unless told)"
    flag("--nproc-per-node", type=int, default=1, metavar="N", help=ranks)
    flag("--nnodes", type=int, default=1, metavar="N", help="hosts (1)")
    flag("--memory", type=float, metavar="GIB", help="of a host (this one's)")
    flag("--format", choices=("text", "json"), default="text")
    return parser.parse_args(argv)


def estimate(argv: Sequence[str]) -> int:
    """Prints what each strategy needs; the exit code tells whether the one asked for fits: 0, or 1.

    Raises:
        UserError: there is no such run or model, or a number is out of range.
    """
    args = parse_args(argv)
    for name in ("nproc_per_node", "nnodes"):
        if getattr(args, name) < 1:
            raise UserError(f'falcon estimate: --{name.replace("_", "-")} must be at least 1: "{getattr(args, name)}"')
    if args.memory is not None and not 0 < args.memory < math.inf:
        raise UserError(f'falcon estimate: --memory must be above 0 GiB: "{args.memory:g}"')
    config = load(args.run or default_source(args.sets), args.sets)
    plan = load_config(find_model(config.model), config.model)
    check_model(config, plan)
    host = int(args.memory * GIB) if args.memory is not None else total_bytes()
    ranks = args.nproc_per_node
    found = {
        name: on_host_of(memory, config, ranks, host)
        for name, memory in _predictions(config, plan, ranks * args.nnodes).items()
    }
    told = [_row(name, memory, ranks, host) for name, memory in found.items()]
    if args.format == "json":
        print(json.dumps({"host_bytes": host, "asked": config.strategy, "strategies": told}))
    else:
        print(f"{config.model.name}, {ranks} ranks on each of {args.nnodes} hosts of {host / GIB:.1f} GiB")
        for row, memory in zip(told, found.values(), strict=True):
            asked = "*" if row["strategy"] == config.strategy else " "
            verdict = "fits" if row["fits"] else "does not fit"
            print(
                f"{asked} {row['strategy']:12} {row['host_bytes'] / GIB:8.2f} GiB a host, {verdict:13} {memory.text()}"
            )
    return 0 if told[0]["fits"] else 1


def _predictions(config: TrainConfig, plan: PreTrainedConfig, world_size: int) -> dict[str, RankMemory]:
    """By strategy, the one asked for first; others that this model or these settings cannot have are left out."""
    check_agreement(config)
    found: dict[str, RankMemory] = {config.strategy: predict(config, plan, world_size)}
    for name in NEAREST:
        other = dataclasses.replace(config, strategy=name)
        with contextlib.suppress(UserError):
            check_agreement(other)
            found.setdefault(name, predict(other, plan, world_size))
    return found


def _row(name: str, memory: RankMemory, ranks: int, host: int) -> dict[str, Any]:
    needed = memory.on_host(ranks)
    parts = dataclasses.asdict(memory)
    return {
        "strategy": name,
        "rank_bytes": memory.total,
        "host_bytes": needed,
        "fits": needed <= usable(host),
        "parts": parts,
    }
