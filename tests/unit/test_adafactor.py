"""Adafactor against transformers' own in fp32, its rounding, and what is held while backward goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import SHAPES, falcon_7b, make_model
from torch.profiler import ProfilerActivity, profile
from transformers.optimization import Adafactor as Reference

from falcon_dist.config import OptimConfig, TrainConfig
from falcon_dist.contract import UnsoundError, UserError
from falcon_dist.engine import adafactor
from falcon_dist.engine.adafactor import Adafactor, round_stochastic_
from falcon_dist.order import Schedule
from falcon_dist.strategy.lowmem import FullLowMemory
from falcon_dist.world import World


def gradients(step: int, shapes: list[torch.Size]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]


@pytest.mark.parametrize("block", [16, 1 << 18])
def test_five_fp32_steps_equal_those_of_transformers(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adafactor, "BLOCK", block)
    shapes = [torch.Size([24, 10]), torch.Size([7]), torch.Size([3, 40])]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in gradients(99, shapes)] for _ in range(2))
    mine = Adafactor([{"params": ours}], lr=1e-2, weight_decay=0.1)
    options = {"scale_parameter": False, "relative_step": False, "weight_decay": 0.1}
    reference = Reference(theirs, lr=1e-2, **options)
    for step in range(5):
        for a, b, grad in zip(ours, theirs, gradients(step, shapes), strict=True):
            mine.step_one(a, grad.clone())
            b.grad = grad
        assert mine.norm == pytest.approx(float(torch.cat([b.grad.flatten() for b in theirs]).norm()), rel=1e-6)
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


def test_rounding_goes_to_both_neighbours_and_keeps_the_mean() -> None:
    values = torch.tensor([1.001, -1.001, 3e-5, 0.0]).repeat_interleave(65536)
    rounded = values.clone()
    noise = torch.arange(65536, dtype=torch.int32).repeat(4)
    round_stochastic_(rounded, noise)
    assert torch.equal(rounded, rounded.bfloat16().float())
    for before, after in zip(values.view(4, -1), rounded.view(4, -1), strict=True):
        assert len(after.unique()) == (2 if before[0] else 1)
        assert torch.isclose(after.double().mean(), before[0].double(), rtol=1e-6)


def test_small_updates_are_kept_on_average_where_plain_rounding_loses_them() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
    optimizer = Adafactor([{"params": [weight]}], lr=1e-4)
    for _ in range(50):
        optimizer.step_one(weight, torch.ones(64, 256, dtype=torch.bfloat16))
        optimizer.step()
    assert torch.equal(torch.tensor(1.0).bfloat16() - 1e-4, torch.tensor(1.0).bfloat16())
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 50e-4, abs=3e-4)


def prepared(shape: str) -> tuple[torch.nn.Module, Adafactor]:
    model = make_model(SHAPES[shape]()).to(torch.bfloat16)
    return model, FullLowMemory(TrainConfig(optim=OptimConfig(lr=1e-3)), World()).make_optimizer(model)


@pytest.mark.parametrize("shape", ["falcon-7b", "llama"])
def test_gradients_are_freed_one_by_one_and_the_tied_embedding_is_stepped_last(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = prepared(shape)
    held: list[int] = []
    stepped: list[torch.Tensor] = []
    step_one = Adafactor.step_one

    def watched(self: Adafactor, param: torch.Tensor, grad: torch.Tensor) -> None:
        held.append(sum(p.grad is not None for p in model.parameters()))
        stepped.append(param)
        step_one(self, param, grad)

    monkeypatch.setattr(Adafactor, "step_one", watched)
    before = [param.detach().clone() for param in model.parameters()]
    model(input_ids=torch.arange(32)[None], labels=torch.arange(32)[None]).loss.backward()
    optimizer.step()
    assert max(held) == 0
    assert len(stepped) == len({*stepped}) == len(before)
    assert stepped[-1] is model.get_input_embeddings().weight is model.get_output_embeddings().weight
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert sum(changed) > len(changed) // 2


def test_a_gradient_that_is_not_finite_changes_nothing_and_names_its_weight() -> None:
    model = make_model(SHAPES["falcon-7b"]()).to(torch.bfloat16)
    strategy = FullLowMemory(TrainConfig(), World())
    strategy.check(Schedule(num_rows=9, micro_batch=2, grad_accum=1, world_size=1, total_steps=3, total_rows=6, seed=0))
    strategy.make_optimizer(model)
    before = [param.detach().clone() for param in model.parameters()]
    logits = model(input_ids=torch.arange(8)[None]).logits
    words = r"transformer\.ln_f\.\w+: the norm of a gradient is nan at step 1: rank 0 had rows \[\d, \d\]$"
    with pytest.raises(UnsoundError, match=words):
        (logits.sum() * float("nan")).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_weight_is_clipped_by_its_own_norm() -> None:
    """Adafactor forgets a gradient's scale within a step, so clipping shows in what it remembers."""
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = Adafactor([{"params": [weight]}], lr=1e-3, max_grad_norm=1.0)
    optimizer.step_one(weight, torch.full((4, 4), 100.0))
    assert torch.allclose(optimizer.state[weight]["row"], torch.full((4,), 1 / 16), rtol=1e-5)


def test_no_copy_of_a_whole_gradient_is_made() -> None:
    weight = torch.nn.Parameter(torch.zeros(2048, 512, dtype=torch.bfloat16))
    optimizer = Adafactor([{"params": [weight]}], lr=1e-3, max_grad_norm=1.0)
    grad = torch.ones_like(weight)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        optimizer.step_one(weight, grad)
    taken = [event.self_cpu_memory_usage for event in profiled.events()]
    assert 0 < max(taken) <= 4 * adafactor.BLOCK < 4 * weight.numel()


def test_accumulation_is_refused() -> None:
    schedule = Schedule(num_rows=8, micro_batch=1, grad_accum=2, world_size=1, total_steps=1, total_rows=2, seed=0)
    with pytest.raises(UserError, match=r"cannot accumulate 2 micro-batches; set loop\.micro_batch=2"):
        FullLowMemory(TrainConfig(), World()).check(schedule)


def test_state_is_a_row_and_a_column_of_each_matrix_and_there_before_any_gradient() -> None:
    model, optimizer = prepared("falcon-7b")
    places = {id(tensor) for state in optimizer.state.values() for tensor in state.values()}
    assert len(optimizer.state) == len(list(model.parameters()))
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    width = falcon_7b().hidden_size
    state = optimizer.state[model.transformer.h[0].mlp.dense_h_to_4h.weight]
    assert {kind: tuple(tensor.shape) for kind, tensor in state.items()} == {"row": (4 * width,), "column": (width,)}
    assert places == {id(tensor) for state in optimizer.state.values() for tensor in state.values()}


RANK = """
import sys, torch, torch.distributed as dist
from falcon_dist.config import TrainConfig
from falcon_dist.replicas import checksums
from falcon_dist.strategy.lowmem import FullLowMemory
from falcon_dist.world import World
rank = int(sys.argv[1])
torch.set_num_threads(1 + rank)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
model = torch.nn.Linear(8, 49152)
for param in model.parameters():
    dist.broadcast(param.data, src=0)
world = World(rank=rank, world_size=2, local_rank=rank, local_world_size=2)
optimizer = FullLowMemory(TrainConfig(), world).make_optimizer(model)
for step in range(4):
    torch.manual_seed(2 * step + rank)
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
names = {param: name for name, param in model.named_parameters()}
print(checksums({**dict(model.named_parameters()), **optimizer.named_state(names)}).tolist())
"""


def test_ranks_of_other_processors_and_threads_stay_equal(tmp_path: Path) -> None:
    """The second one's libraries add up in the order of another kind of processor."""
    other = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meeting")],
            env={**os.environ, **(other if rank else {})},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert told[0] == told[1]
