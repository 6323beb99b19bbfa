"""One rank of two: rank 1 is killed, rank 0 is asked for a checkpoint that takes 2.5 s and leaves as in a run."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import falcon_dist.ccl  # noqa: F401
from falcon_dist.contract import EMERGENCY_SIGNAL
from falcon_dist.emergency import Emergency


def save() -> tuple[Path, int]:
    time.sleep(2.5)
    return Path("step-000001"), 1


def main() -> None:
    dist.init_process_group("ccl")
    data = torch.ones(3, dtype=torch.float64)
    dist.all_reduce(data)
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    reporter = SimpleNamespace(takes=lambda word: None, checkpoint=lambda *_, **__: print("committed", flush=True))
    emergency = Emergency(save, reporter)  # type: ignore[arg-type]
    emergency.offer()
    threading.Timer(0.2, lambda: os.kill(os.getpid(), EMERGENCY_SIGNAL)).start()
    try:
        dist.all_reduce(data)
    except dist.DistBackendError as error:
        print(error, flush=True)
        emergency.wait_after(error)
        print("leaves", flush=True)
        sys.stdout.flush()
        os._exit(1)


if __name__ == "__main__":
    main()
