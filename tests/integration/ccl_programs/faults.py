"""One rank of a group in which rank 1 misbehaves. argv: the fault. The group's timeout is 8 s.

Rank 0 prints how long its call took to fail and the error; a rank that is not told to die must not exit 0.
"""

from __future__ import annotations

import datetime
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import falcon_dist.ccl  # noqa: F401

WRONG = {
    "size": torch.ones(999),
    "large-size": torch.ones(1 << 20),
    "dtype": torch.ones(1000, dtype=torch.int32),
}


def even_gather() -> None:
    dist.gather(torch.ones(2), [torch.ones(2), torch.ones(3)] if dist.get_rank() == 0 else None, dst=0)


def even_scatter() -> None:
    dist.scatter(torch.ones(2), [torch.ones(2), torch.ones(3)] if dist.get_rank() == 0 else None, src=0)


def exchange(sent: int, expected: int) -> None:
    """So much for the other rank, and one number for this one."""
    mine = [1, 1]
    sends, receives = list(mine), list(mine)
    sends[1 - dist.get_rank()], receives[1 - dist.get_rank()] = sent, expected
    dist.all_to_all_single(torch.zeros(sum(receives)), torch.ones(sum(sends)), receives, sends)


CALLS = {
    "exchange": (lambda: exchange(3, 2), lambda: exchange(2, 2)),
    "gather": (even_gather, even_gather),
    "scatter": (even_scatter, even_scatter),
    "ragged": (
        lambda: dist.all_gather([torch.ones(2), torch.ones(3)], torch.ones(2)),
        lambda: dist.all_gather([torch.ones(3), torch.ones(2)], torch.ones(2)),
    ),
    "root": (lambda: dist.reduce(torch.ones(1000), 0), lambda: dist.reduce(torch.ones(1000), 1)),
    "barrier": (dist.barrier, lambda: os.kill(os.getpid(), signal.SIGKILL)),
}
"""What rank 0 and rank 1 do where it is not an all_reduce that rank 0 waits in."""


def misbehave(fault: str) -> None:
    """Rank 1."""
    if fault in CALLS:
        CALLS[fault][1]()
    elif fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "absent":
        time.sleep(30)
    elif fault in WRONG:
        dist.all_reduce(WRONG[fault])
    elif fault == "operation":
        dist.broadcast(torch.ones(1000), 0)
    elif fault == "mid-transfer":
        threading_kill(0.05)
        for _ in range(1000):
            dist.all_reduce(torch.ones(8 << 20))
    elif fault == "leaves":
        sys.exit(0)


def threading_kill(after_s: float) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, after_s)


def main() -> None:
    fault = sys.argv[1]
    dist.init_process_group("ccl", timeout=datetime.timedelta(seconds=8))
    data = torch.ones(1000)
    dist.all_reduce(data)
    if dist.get_rank() == 1:
        misbehave(fault)
        return
    started = time.monotonic()
    try:
        if fault == "mid-transfer":
            for _ in range(1000):
                dist.all_reduce(torch.ones(8 << 20))
        if fault in CALLS:
            CALLS[fault][0]()
        dist.all_reduce(data, async_op=fault == "die").wait() if fault == "die" else dist.all_reduce(data)
    finally:
        print(f"failed after {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
