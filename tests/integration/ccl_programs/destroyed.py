"""One rank of two: rank 0 queues four all_reduces and destroys the group; rank 1 comes to the first two only, late."""

from __future__ import annotations

import datetime
import os
import time

import torch
import torch.distributed as dist

import falcon_dist.ccl  # noqa: F401


def queue_and_destroy() -> None:
    tensors = [torch.ones(4, dtype=torch.float64) for _ in range(4)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    dist.destroy_process_group()
    for index, (work, tensor) in enumerate(zip(works, tensors, strict=True)):
        try:
            work.wait()
        except dist.DistBackendError as error:
            print(f"{index}: {error}", flush=True)
        else:
            print(f"{index}: sum {tensor[0].item()}", flush=True)


def main() -> None:
    dist.init_process_group("ccl", timeout=datetime.timedelta(seconds=3))
    dist.barrier()
    if dist.get_rank() == 0:
        queue_and_destroy()
        return
    for _ in range(2):
        time.sleep(2)
        dist.all_reduce(torch.ones(4, dtype=torch.float64))
    os._exit(0)


if __name__ == "__main__":
    main()
