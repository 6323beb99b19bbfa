"""One rank: memory after 10,000 collectives of several kinds, against memory after the first 2,000."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

import falcon_dist.ccl  # noqa: F401

ALLOWED_KIB = 4096


def resident_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def some(count: int) -> None:
    data = torch.ones(1000)
    gathered = torch.empty(1000 * dist.get_world_size())
    for index in range(count // 4):
        work = dist.all_reduce(data, dist.ReduceOp.AVG, async_op=True)
        work.wait()
        dist.all_reduce(data, dist.ReduceOp.MAX)
        dist.all_gather_into_tensor(gathered, data)
        dist.broadcast(data.view(10, 100).t(), index % dist.get_world_size())


def main() -> None:
    dist.init_process_group("ccl")
    some(2000)
    before = resident_kib()
    some(10000)
    grown = resident_kib() - before
    print(f"grown by {grown} KiB")
    dist.destroy_process_group()
    assert grown < ALLOWED_KIB


if __name__ == "__main__":
    main()
