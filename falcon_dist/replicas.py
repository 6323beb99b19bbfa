"""Replicas stay equal: every so many steps all ranks compare checksums of weights and optimizer state.

Ranks of plain data parallelism hold the same bits. A rank whose memory or processor has erred trains something else
from then on, and what it sends spoils the others' gradients without a word; here the run ends instead.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from falcon_dist.contract import UnsoundError
from falcon_dist.team import Team

_WORD_BYTES = 8


@torch.no_grad()
def checksums(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The sum of each tensor's bytes taken as 64-bit words, modulo 2^64: int64 [number of tensors].

    Every bit counts: one that is flipped changes a sum by a power of two, which is never 0.
    """
    return torch.stack([_sum_of(tensor.detach()) for tensor in tensors.values()])


def _sum_of(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    whole = len(flat) // _WORD_BYTES * _WORD_BYTES
    words = flat[:whole].clone() if flat.storage_offset() % _WORD_BYTES else flat[:whole]
    return words.view(torch.int64).sum() + flat[whole:].sum(dtype=torch.int64)


def odd_ranks(sums: Sequence[int]) -> list[int]:
    """The ranks that do not hold what most hold; all of them where no value has the most votes. Pure.

    >>> odd_ranks([7, 7, 9, 7]), odd_ranks([7, 9]), odd_ranks([7, 7])
    ([2], [0, 1], [])
    """
    votes = Counter(sums).most_common(2)
    if len(votes) == 1:
        return []
    if votes[0][1] == votes[1][1]:
        return list(range(len(sums)))
    return [rank for rank, value in enumerate(sums) if value != votes[0][0]]


def check_equal(tensors: Mapping[str, torch.Tensor], team: Team, world_size: int, step: int) -> None:
    """Compares all ranks' tensors; to be called by all of them.

    Raises:
        UnsoundError: on every rank, where they are not equal; names who differs, in what.
    """
    mine = checksums(tensors)
    others = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(others, mine)
    table = torch.stack(others)
    differs = (table != table[0]).any(dim=0).nonzero().flatten().tolist()
    if not differs:
        return
    name = list(tensors)[differs[0]]
    odd = odd_ranks(table[:, differs[0]].tolist())
    raise UnsoundError(_told(odd, name, team, world_size, step))


def _told(odd: list[int], name: str, team: Team, world_size: int, step: int) -> str:
    hosts = team.everyone_says("replicas", socket.gethostname(), world_size)
    named = ", ".join(f"rank {rank} (host {hosts[rank]})" for rank in odd)
    what = f'replicas: after step {step} "{name}" is not the same on all ranks'
    if len(odd) == world_size:
        return f"{what}: {named} differ, and no majority tells which one is right; checkpoints before this are sound"
    return f"{what}: {named} differs from the others; its memory or processor has erred: leave that host out"
