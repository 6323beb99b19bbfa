"""One rank: trains a small model on ccl and on gloo and compares. argv: ddp, fsdp, bf16-hook."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from falcon_dist.ccl.hooks import bf16_gradients

STEPS = 5


def model() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(67, 129), nn.GELU(), nn.Linear(129, 129), nn.GELU(), nn.Linear(129, 5))


def steps(trained: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(dist.get_rank())
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = trained(torch.randn(16, 67, generator=generator)).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def ddp(group: dist.ProcessGroup) -> list[torch.Tensor]:
    # Small buckets, so that several are in flight.
    wrapped = DistributedDataParallel(model(), process_group=group, bucket_cap_mb=0.05)
    losses = steps(wrapped)
    return [torch.tensor(losses), *wrapped.state_dict().values()]


def ddp_bf16(group: dist.ProcessGroup) -> list[torch.Tensor]:
    wrapped = DistributedDataParallel(model(), process_group=group, bucket_cap_mb=0.05)
    wrapped.register_comm_hook(group, bf16_gradients)
    losses = steps(wrapped)
    return [torch.tensor(losses), *wrapped.state_dict().values()]


def fsdp(group: dist.ProcessGroup) -> list[torch.Tensor]:
    mesh = DeviceMesh.from_group(group, "cpu")
    sharded = model()
    for layer in sharded:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    if dist.get_backend(group) == "gloo":
        # Where gloo is asked for an average, torch 2.8 hands back the sum.
        for module in sharded.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    losses = steps(sharded)
    return [torch.tensor(losses), *(value.full_tensor() for value in sharded.state_dict().values())]


PARTS: dict[str, Callable[[dist.ProcessGroup], list[torch.Tensor]]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "bf16-hook": ddp_bf16,
}


def main() -> None:
    part = sys.argv[1]
    dist.init_process_group("ccl")
    train = PARTS[part]
    mine = train(dist.group.WORLD)
    theirs = train(dist.new_group(backend="gloo"))
    exact = dist.get_world_size() == 2  # one addition per element, so no order in which to round
    for found, wanted in zip(mine, theirs, strict=True):
        tolerance = 0.0 if exact else 1e-5
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    print("equal")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
