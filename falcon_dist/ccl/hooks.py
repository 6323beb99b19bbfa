"""A DDP hook that sends gradients as bfloat16.

DDP reads the annotations of its hooks, so they are not postponed in this module.
"""

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket


def bf16_gradients(group: dist.ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Averages a bucket of float32 gradients in half the bytes: ``model.register_comm_hook(group, this)``.

    Gradients are rounded to bfloat16 once before and once after the sum. Between the ranks of one host
    ccl adds them up in float32; over the network oneCCL rounds after every addition. The division by the
    group's size is done in the bucket's own dtype. torch's ``bf16_compress_hook`` refuses CPUs.
    """
    chosen = group or dist.group.WORLD
    assert chosen is not None  # DDP exists, so the default group does
    buffer = bucket.buffer()
    work = dist.all_reduce(buffer.to(torch.bfloat16), group=chosen, async_op=True)
    size = dist.get_world_size(chosen)

    def widen(sent: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        buffer.copy_(sent.value()[0]).div_(size)
        return buffer

    assert work is not None  # asynchronous, and this rank is a member
    future: torch.futures.Future[torch.Tensor] = work.get_future().then(widen)
    return future
