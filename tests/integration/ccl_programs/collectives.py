"""One rank: calls every collective on ccl and on gloo and compares all elements. argv: the part to run."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

import falcon_dist.ccl  # noqa: F401

SIZES = (0, 1, 2, 13, 1021, 65537)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTS = (torch.int8, torch.uint8, torch.int32, torch.int64)
OPS = (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT)


def sample(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Small whole numbers, so that every dtype holds every result exactly."""
    values = torch.randint(0, 4, (size,), generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def same(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    assert found.dtype == wanted.dtype, what
    assert torch.equal(found, wanted), f"{what}: {found.flatten()[:5]} is not {wanted.flatten()[:5]}"


def cases() -> Iterator[tuple[torch.dtype, int]]:
    yield from itertools.product((*FLOATS, *INTS), SIZES)


def reductions(gloo: dist.ProcessGroup) -> None:
    """all_reduce, reduce, reduce_scatter with every dtype, operation and size; gloo sums in a wider type."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for (dtype, size), op in itertools.product(cases(), OPS):
        if op == dist.ReduceOp.AVG and not dtype.is_floating_point:
            continue
        what = f"{dtype} {size} {op}"
        mine = sample(size * world, dtype, seed=rank)
        wanted = reference(mine, op, gloo)
        found = mine.clone()
        dist.all_reduce(found, op)
        same(found, wanted, f"all_reduce {what}")
        found = mine.clone()
        dist.reduce(found, world - 1, op)
        if rank == world - 1:
            same(found, wanted, f"reduce {what}")
        piece = torch.empty(size, dtype=dtype)
        dist.reduce_scatter_tensor(piece, mine, op)
        same(piece, wanted.chunk(world)[rank] if size else wanted, f"reduce_scatter_tensor {what}")
        piece = torch.empty(size, dtype=dtype)
        dist.reduce_scatter(piece, list(mine.view(world, size)), op)
        same(piece, wanted.view(world, size)[rank], f"reduce_scatter {what}")
    truths(gloo)
    several(gloo)


def reference(mine: torch.Tensor, op: dist.ReduceOp.RedOpType, gloo: dist.ProcessGroup) -> torch.Tensor:
    """gloo's result, computed in a type that gloo can reduce without rounding."""
    wide = mine.to(torch.float64 if mine.dtype.is_floating_point else torch.int64, copy=True)
    dist.all_reduce(wide, dist.ReduceOp.SUM if op == dist.ReduceOp.AVG else op, group=gloo)
    if op == dist.ReduceOp.AVG:
        wide /= dist.get_world_size(gloo)
    return wide.to(mine.dtype)


def truths(gloo: dist.ProcessGroup) -> None:
    """bool, bitwise and complex."""
    rank = dist.get_rank()
    for op, word in ((dist.ReduceOp.MAX, dist.ReduceOp.MAX), (dist.ReduceOp.BAND, dist.ReduceOp.MIN)):
        flags = torch.tensor([True, rank == 0, False])
        wanted = flags.to(torch.uint8)
        dist.all_reduce(flags, op)
        dist.all_reduce(wanted, word, group=gloo)
        same(flags, wanted.bool(), f"bool {op}")
    bits = torch.tensor([1, 2, 4]) << rank
    wanted = bits.clone()
    dist.all_reduce(bits, dist.ReduceOp.BOR)
    dist.all_reduce(wanted, dist.ReduceOp.BOR, group=gloo)
    same(bits, wanted, "bitwise or")
    waves = torch.complex(sample(13, torch.float32, rank), sample(13, torch.float32, rank + 9))
    parts = torch.view_as_real(waves).clone()
    dist.all_reduce(waves)
    dist.all_reduce(parts, group=gloo)
    same(torch.view_as_real(waves), parts, "complex sum")


def several(gloo: dist.ProcessGroup) -> None:
    """Coalesced forms and strided memory."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tensors = [sample(n, d, rank) for n, d in ((13, torch.float32), (1, torch.bfloat16), (0, torch.int64))]
    wanted = [reference(tensor, dist.ReduceOp.SUM, gloo) for tensor in tensors]
    with dist._coalescing_manager():
        for tensor in tensors:
            dist.all_reduce(tensor)
    for found, want in zip(tensors, wanted, strict=True):
        same(found, want, "all_reduce coalesced")
    whole = sample(12 * world, torch.float32, rank)
    outs = [torch.empty(12), torch.empty(12)]
    with dist._coalescing_manager():
        for out in outs:
            dist.reduce_scatter_tensor(out, whole)
    for out in outs:
        same(out, reference(whole, dist.ReduceOp.SUM, gloo).chunk(world)[rank], "reduce_scatter coalesced")
    square = sample(12, torch.float32, rank).view(3, 4)
    wanted_square = reference(square, dist.ReduceOp.SUM, gloo)
    turned = square.t()
    assert not turned.is_contiguous()
    dist.all_reduce(turned)
    same(square, wanted_square, "all_reduce of a transposed tensor")


def movement(gloo: dist.ProcessGroup) -> None:
    """Everything that moves bytes, with every dtype and size."""
    everything = (*cases(), *((torch.bool, size) for size in SIZES), (torch.complex64, 13))
    for dtype, size in everything:
        what = f"{dtype} {size}"
        for call in (broadcast, gathers, into_tensor, scatters, exchanges):
            compare(call, dtype, size, gloo, f"{call.__name__} {what}")
    uneven_exchange(gloo)
    messages()
    coalesced_gather()


def compare(
    call: Callable[..., list[torch.Tensor]], dtype: torch.dtype, size: int, gloo: dist.ProcessGroup, what: str
) -> None:
    """gloo moves the same whole numbers as int64: it does not know every dtype."""
    for found, wanted in zip(call(dtype, size, None), call(torch.int64, size, gloo), strict=True):
        same(found, wanted.to(dtype), what)


def broadcast(dtype: torch.dtype, size: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    found = sample(size, dtype, dist.get_rank())
    dist.broadcast(found, dist.get_world_size() - 1, group=group)
    return [found]


def gathers(dtype: torch.dtype, size: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = sample(size, dtype, rank)
    everywhere = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everywhere, mine, group=group)
    at_root = [torch.empty_like(mine) for _ in range(world)] if rank == 0 else None
    dist.gather(mine, at_root, dst=0, group=group)
    return everywhere + (at_root or [])


def into_tensor(dtype: torch.dtype, size: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    found = torch.empty(size * dist.get_world_size(), dtype=dtype)
    dist.all_gather_into_tensor(found, sample(size, dtype, dist.get_rank()), group=group)
    return [found]


def scatters(dtype: torch.dtype, size: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    world = dist.get_world_size()
    pieces = [sample(size, dtype, seed) for seed in range(world)] if dist.get_rank() == 0 else None
    found = torch.empty(size, dtype=dtype)
    dist.scatter(found, pieces, src=0, group=group)
    return [found]


def exchanges(dtype: torch.dtype, size: int, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    world = dist.get_world_size()
    mine = sample(size * world, dtype, dist.get_rank())
    found = torch.empty_like(mine)
    dist.all_to_all_single(found, mine, group=group)
    return [found]


def uneven_exchange(gloo: dist.ProcessGroup) -> None:
    """Rank r sends r + p rows to rank p."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = [rank + peer for peer in range(world)]
    mine = sample(sum(sizes) * 3, torch.float32, rank).view(-1, 3)
    found, wanted = torch.empty_like(mine), torch.empty_like(mine)
    dist.all_to_all_single(found, mine, sizes, sizes)
    dist.all_to_all_single(wanted, mine, sizes, sizes, group=gloo)
    same(found, wanted, "all_to_all_single uneven")
    listed = [torch.empty(size, 3) for size in sizes]
    dist.all_to_all(listed, list(mine.split(sizes)))
    same(torch.cat(listed), wanted, "all_to_all")
    ragged = [torch.empty(peer + 1) for peer in range(world)]
    dist.all_gather(ragged, torch.full((rank + 1,), float(rank)))
    for peer, row in enumerate(ragged):
        same(row, torch.full((peer + 1,), float(peer)), "all_gather uneven")


def messages() -> None:
    """send, recv, isend, irecv, batched, in a ring and with tags."""
    rank, world = dist.get_rank(), dist.get_world_size()
    after, before = (rank + 1) % world, (rank - 1) % world
    found = torch.empty(1021)
    if rank == 0:
        dist.send(sample(1021, torch.float32, rank), after, tag=5)
        dist.recv(found, before, tag=5)
    else:
        dist.recv(found, before, tag=5)
        dist.send(sample(1021, torch.float32, rank), after, tag=5)
    same(found, sample(1021, torch.float32, before), "send and recv")
    found.zero_()
    work = [
        dist.P2POp(dist.isend, sample(1021, torch.float32, rank), after),
        dist.P2POp(dist.irecv, found, before),
    ]
    for one in dist.batch_isend_irecv(work):
        one.wait()
    same(found, sample(1021, torch.float32, before), "batch_isend_irecv")


def coalesced_gather() -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    outs = [torch.empty(3 * world), torch.empty(5 * world)]
    with dist._coalescing_manager():
        for out in outs:
            dist.all_gather_into_tensor(out, sample(len(out) // world, torch.float32, rank))
    for out in outs:
        wanted = torch.cat([sample(len(out) // world, torch.float32, peer) for peer in range(world)])
        same(out, wanted, "all_gather_into_tensor coalesced")


def groups(gloo: dist.ProcessGroup) -> None:
    """Sub-groups, many at once and in flight together; objects; works and futures."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parity = [dist.new_group(list(range(start, world, 2))) for start in (0, 1)]
    twins = [dist.new_group(list(range(world))) for _ in range(3)]
    mine = parity[rank % 2]
    found = torch.full((1021,), float(rank))
    dist.all_reduce(found, group=mine)
    same(found, torch.full((1021,), float(sum(range(rank % 2, world, 2)))), "all_reduce of a sub-group")
    tensors = [torch.full((65537,), float(rank + index)) for index in range(9)]
    works = [dist.all_reduce(t, group=twins[i % 3], async_op=True) for i, t in enumerate(tensors)]
    assert works[0].get_future().wait()[0] is not None
    for work in reversed(works):
        work.wait()
        assert work.is_completed()
        assert work.is_success()
    for index, tensor in enumerate(tensors):
        same(tensor, torch.full((65537,), float(sum(range(world)) + index * world)), "async works")
    objects: list[object] = [None] * world
    dist.all_gather_object(objects, {"rank": rank, "text": "x" * rank * 1000})
    assert objects == [{"rank": peer, "text": "x" * peer * 1000} for peer in range(world)]
    told: list[object] = [("from", rank), rank]
    dist.broadcast_object_list(told, src=world - 1)
    assert told == [("from", world - 1), world - 1]
    scattered: list[object] = [None]
    dist.scatter_object_list(scattered, [f"for {peer}" for peer in range(world)] if rank == 0 else None, src=0)
    assert scattered == [f"for {rank}"]
    crossed(twins[0])
    callbacks()
    inference()
    dist.barrier()
    dist.destroy_process_group(twins[0])
    dist.barrier(group=twins[1])


def crossed(twin: dist.ProcessGroup) -> None:
    """Two groups, entered in another order by every other rank: a barrier of one does not hold up the other."""
    rank, world = dist.get_rank(), dist.get_world_size()
    tensors = [torch.ones(4, dtype=torch.float64) for _ in range(3)]
    if rank % 2:
        time.sleep(0.3)
        for tensor in tensors:
            dist.all_reduce(tensor, group=twin)
        dist.barrier()
    else:
        works = [dist.all_reduce(tensor, group=twin, async_op=True) for tensor in tensors]
        dist.barrier()
        for work in works:
            work.wait()
    for tensor in tensors:
        same(tensor, torch.full((4,), float(world), dtype=torch.float64), "beside a barrier")


def callbacks() -> None:
    """What a future calls may wait for more of the same group, for what is queued behind it too."""
    world = dist.get_world_size()
    works, queued = [], threading.Event()

    def again(done: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        queued.wait()  # the first may be over before the second is there
        works[1].wait()
        dist.all_reduce(done.value()[0])
        return dist.all_reduce(done.value()[0], async_op=True).get_future().wait()[0]

    works.append(dist.all_reduce(torch.ones(4), async_op=True))
    future = works[0].get_future().then(again)
    works.append(dist.all_reduce(torch.ones(4), async_op=True))
    queued.set()
    same(future.wait(), torch.full((4,), float(world**3)), "all_reduce within a callback")


def inference() -> None:
    """A thread of the group works as its caller would."""
    world = dist.get_world_size()
    with torch.inference_mode():
        turned = torch.ones(3, 4, dtype=torch.float64).t()
        dist.all_reduce(turned, async_op=True).wait()
        mean = torch.ones(3, dtype=torch.float64)
        dist.all_reduce(mean, dist.ReduceOp.AVG, async_op=True).wait()
        same(turned, torch.full((4, 3), float(world), dtype=torch.float64), "inference mode, strided")
        same(mean, torch.ones(3, dtype=torch.float64), "inference mode, average")


def main() -> None:
    dist.init_process_group("ccl")
    gloo = dist.new_group(backend="gloo")
    {"reductions": reductions, "movement": movement, "groups": groups}[sys.argv[1]](gloo)
    dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main()
