"""One rank: five steps of a small model under DeepSpeed ZeRO; prints the losses. argv: backend, stage."""

from __future__ import annotations

import json
import sys

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import falcon_dist.ccl  # noqa: F401

STEPS = 5


def main() -> None:
    backend, stage = sys.argv[1], int(sys.argv[2])
    # DeepSpeed keeps a group that is open. Its own shared memory all_reduce would be compiled now, for minutes.
    dist.init_process_group(backend)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(67, 129), nn.GELU(), nn.Linear(129, 5))
    settings = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), config=settings
    )
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(STEPS):
        loss = engine(torch.randn(16, 67, generator=generator)).pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    print("losses", json.dumps([dist.get_backend(), losses]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
