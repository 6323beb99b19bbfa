"""One rank: all_reduce until one fails. argv: the group's timeout in seconds.

Prints "ready" after the first, and in the end how long the failing call, or the opening of the group, took.
"""

from __future__ import annotations

import datetime
import sys
import time

import torch
import torch.distributed as dist

import falcon_dist.ccl  # noqa: F401


def main() -> None:
    started = time.monotonic()
    try:
        dist.init_process_group("ccl", timeout=datetime.timedelta(seconds=float(sys.argv[1])))
        data = torch.zeros(1 << 18)
        dist.all_reduce(data)
        print("ready", flush=True)
        while True:
            started = time.monotonic()
            dist.all_reduce(data)
            time.sleep(0.01)
    finally:
        print(f"failed after {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
