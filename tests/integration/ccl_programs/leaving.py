"""One rank: some work, then one of the ways in which programs end. argv: destroy, leave or exit7."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

import falcon_dist.ccl  # noqa: F401


def main() -> None:
    dist.init_process_group("ccl")
    side = dist.new_group()
    for _ in range(20):
        works = [dist.all_reduce(torch.ones(1000), group=group, async_op=True) for group in (None, side)]
        for work in works:
            work.wait()
    if sys.argv[1] == "destroy":
        dist.destroy_process_group()
    if sys.argv[1] == "exit7":
        sys.exit(7)


if __name__ == "__main__":
    main()
