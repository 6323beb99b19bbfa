"""One rank of three: rank 2 sends its part of a gather and ends, rank 1 comes two seconds later."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

import falcon_dist.ccl  # noqa: F401


def main() -> None:
    dist.init_process_group("ccl")
    rank = dist.get_rank()
    dist.barrier()
    if rank == 1:
        time.sleep(2)
    gathered = [torch.empty(4) for _ in range(3)] if rank == 0 else None
    dist.gather(torch.full((4,), float(rank)), gathered, dst=0)
    if gathered:
        assert [one[0].item() for one in gathered] == [0.0, 1.0, 2.0]
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
