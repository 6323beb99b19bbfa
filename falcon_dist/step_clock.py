"""Where the time of a step goes: load, forward, backward, communicate, optimize."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

PARTS: Final = ("load", "forward", "backward", "communicate", "optimize")


class StepClock:
    """Adds up the seconds of each part until they are taken.

    load: rows made into batches. forward, backward: computing. communicate: waiting for the exchange after all
    gradients are there (what runs beside backward costs nothing), and for slower ranks. optimize: clipping and the
    optimizer's step.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.ready: float | None = None
        """When the last bucket of gradients was ready to be sent."""
        self._parts = dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str, *, without: str | None = None) -> Iterator[None]:
        """The block's time, less what another part took inside it."""
        began, inside = self.now(), self._parts.get(without or "", 0.0)
        yield
        self._parts[name] += self.now() - began - (self._parts.get(without or "", 0.0) - inside)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """A forward and backward pass whose forward is measured inside: the rest is split at the last bucket."""
        began, forward = self.now(), self._parts["forward"]
        self.ready = None
        yield
        ended = self.now()
        waited = 0.0 if self.ready is None else ended - self.ready
        self._parts["communicate"] += waited
        self._parts["backward"] += ended - began - waited - (self._parts["forward"] - forward)

    def add(self, name: str, seconds: float) -> None:
        """Time that was measured elsewhere."""
        self._parts[name] += seconds

    def take(self) -> dict[str, float]:
        """Seconds of every part since the last call."""
        taken, self._parts = self._parts, dict.fromkeys(PARTS, 0.0)
        return {name: round(seconds, 6) for name, seconds in taken.items()}


def watch_buckets(model: DistributedDataParallel, clock: StepClock) -> None:
    """DDP's own exchange, and beside it the time at which each bucket was ready."""

    # DDP reads the annotations of its hooks, so they are values.
    def hook(state: StepClock, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        state.ready = state.now()
        return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]

    hook.__annotations__.update(bucket=GradBucket, **{"return": torch.futures.Future[torch.Tensor]})
    model.register_comm_hook(clock, hook)
