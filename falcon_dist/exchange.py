"""One all_reduce between hosts, for falcon doctor: does it work, over which backend, and how fast."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping
from typing import Any, Final

import torch
import torch.distributed as dist

from falcon_dist.ccl_recipe import recipe
from falcon_dist.contract import UserError
from falcon_dist.process_group import open_group
from falcon_dist.world import World

PATIENCE: Final = datetime.timedelta(seconds=20)
NUM_FLOATS: Final = 4 << 20
"""16 MiB: the rate, not the latency."""
TRIES: Final = 3


def exchange(env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """{"backend", "bytes_per_s"} of a float32 all_reduce over the ranks that ``env`` describes, or {"fault"}.

    ccl where every host has it built, else gloo. Bytes are those of the tensor on one rank.
    """
    try:
        with open_group(World.from_env(env), env, timeout=PATIENCE):
            group = _ccl_group()
            return {"backend": "ccl" if group else "gloo", "bytes_per_s": _bytes_per_s(group)}
    except (RuntimeError, OSError, UserError) as error:
        return {"fault": next(iter(str(error).strip().splitlines()), type(error).__name__)}


def _ccl_group() -> dist.ProcessGroup | None:
    """A group of all ranks over ccl, where all of them have it built."""
    built = torch.tensor([int(_is_built())])
    dist.all_reduce(built, dist.ReduceOp.MIN)
    if not int(built):
        return None
    from falcon_dist.ccl import register

    register()
    opened: dist.ProcessGroup | None = dist.new_group(backend="ccl", timeout=PATIENCE)
    return opened


def _is_built() -> bool:
    try:
        return recipe().target.is_file()
    except UserError:
        return False


def _bytes_per_s(group: dist.ProcessGroup | None) -> float:
    data = torch.ones(NUM_FLOATS)
    taken = []
    for _ in range(TRIES):
        dist.barrier(group)
        started = time.perf_counter()
        dist.all_reduce(data, group=group)
        taken.append(time.perf_counter() - started)
    if not torch.equal(data, torch.full_like(data, float(dist.get_world_size() ** TRIES))):
        raise RuntimeError("all_reduce gave a wrong sum")
    return data.nbytes / min(taken)
