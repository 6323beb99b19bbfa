"""One rank of two: the same groups opened and destroyed several times, under the same names in one store."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import falcon_dist.ccl  # noqa: F401

TIMES = 2
TIMEOUT = timedelta(seconds=10)


def use(group: dist.ProcessGroup | None = None) -> None:
    """What goes through shared memory, oneCCL and gloo."""
    for dtype in (torch.float32, torch.int64):
        data = torch.ones(5, dtype=dtype)
        dist.all_reduce(data, group=group)
        assert data.tolist() == [2] * 5
    if dist.get_rank() == 0:
        dist.send(torch.ones(3), 1, group=group)
    else:
        data = torch.zeros(3)
        dist.recv(data, 0, group=group)
        assert data.tolist() == [1] * 3


def connections() -> int:
    """Of this process with the store."""
    port = f":{int(os.environ['MASTER_PORT']):04X}"
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    remote = {f"socket:[{line[9]}]" for line in lines if line[2].endswith(port)}
    return sum(str(path.readlink()) in remote for path in Path("/proc/self/fd").iterdir() if path.is_symlink())


def main() -> None:
    rank = int(os.environ["RANK"])
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), 2, is_master=rank == 0, wait_for_workers=False)
    for _ in range(TIMES):
        dist.init_process_group("ccl", store=store, rank=rank, world_size=2, timeout=TIMEOUT)
        use()
        assert not list(Path("/dev/shm").glob(f"{os.getpid()}:*"))
        for _ in range(TIMES):
            before = connections()
            side = dist.new_group([0, 1], use_local_synchronization=True, timeout=TIMEOUT)
            assert connections() <= before + 1, "one connection a group"
            use(side)
            dist.destroy_process_group(side)
        dist.barrier()
        dist.destroy_process_group()
    print("equal")


if __name__ == "__main__":
    main()
