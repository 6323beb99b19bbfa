"""Opens the collective group of a run and closes it again; the seam by which backends enter."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib
import os
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from falcon_dist import ccl_intel, contract
from falcon_dist.contract import UserError
from falcon_dist.world import World

TIMEOUT = datetime.timedelta(seconds=120)
"""How long a collective may take before its ranks are told; torch's own 30 minutes hide a dead peer."""


@contextlib.contextmanager
def open_group(
    world: World, env: Mapping[str, str] = os.environ, *, timeout: datetime.timedelta = TIMEOUT
) -> Iterator[Store]:
    """The default process group of this run, for CPU tensors, as long as the block lasts; gives the run's store.

    Raises:
        UserError: the backend is not known, or the group is not the world that was launched.
    """
    backend = _enter(env.get(contract.BACKEND, "gloo"))
    store = _store(world, env, timeout)
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout)
    # Not in a "finally": a rank that fails leaves at once, and its peers learn of it when its connections close.
    # Taking the group down could take them along for as long as a collective may take.
    _check_world(world)
    yield store
    # A DDP wrapper that outlives its gloo group can abort the process at exit; the Trainer's is held by cycles.
    gc.collect()
    dist.destroy_process_group()


def _enter(backend: str) -> str:
    """Makes the backend known to torch.distributed; its name there."""
    match backend:
        case "gloo":
            return "gloo"
        case "ccl":
            importlib.import_module("falcon_dist.ccl")
        case "ccl-intel":
            ccl_intel.register()
        case _:
            raise UserError(f'backend: must be "gloo", "ccl" or "ccl-intel": "{backend}"; use --backend')
    return "ccl"


def _store(world: World, env: Mapping[str, str], timeout: datetime.timedelta) -> Store:
    """The run's rendezvous: rank 0 serves it, on the launcher's listening socket where there is one."""
    if contract.MASTER_ADDR not in env:
        return HashStore()
    descriptor = env.get(contract.STORE_FD)
    agent_serves = env.get(contract.USE_AGENT_STORE) == "True"
    return TCPStore(
        env[contract.MASTER_ADDR],
        int(env[contract.MASTER_PORT]),
        world.world_size,
        is_master=world.is_main and not agent_serves,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=int(descriptor) if descriptor is not None else None,
    )


def _check_world(world: World) -> None:
    got = (dist.get_rank(), dist.get_world_size())
    if got != (world.rank, world.world_size):
        raise RuntimeError(f"launched as rank {world.rank} of {world.world_size}, got rank {got[0]} of {got[1]}")
    everyone = torch.ones(1, dtype=torch.int64)
    dist.all_reduce(everyone)
    if int(everyone) != world.world_size:
        raise RuntimeError(f"{int(everyone)} ranks answered, {world.world_size} were launched")


def same_everywhere(digest: bytes, what: str) -> None:
    """Raises UserError on every rank where ranks do not all hold the same bytes.

    Compares fixed-length tensors; nothing is pickled.
    """
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(others, mine)
    odd = [rank for rank, other in enumerate(others) if not torch.equal(other, others[0])]
    if odd:
        raise UserError(f"{what}: rank 0 and ranks {odd} hold different ones; prepare every host from the same source")


def agree_on(number: int) -> int:
    """Rank 0's number, on every rank."""
    box = torch.tensor([number], dtype=torch.int64)
    dist.broadcast(box, src=0)
    return int(box)


def check_place(rank: int, world_size: int, world: World) -> None:
    """The Trainer can silently train alone where it does not see the launcher's group; here that is an error."""
    if (rank, world_size) != (world.rank, world.world_size):
        told = f"launched as rank {world.rank} of {world.world_size}"
        raise RuntimeError(f"{told}, but the trainer is rank {rank} of {world_size}")
