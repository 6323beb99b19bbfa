"""What is told of a step: where its time went, its share of the peak, and numbers that stop it."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from tiny_models import falcon_7b, llama, make_model
from transformers import TrainerControl, TrainerState, TrainingArguments

from falcon_dist.config import LoopConfig
from falcon_dist.contract import UnsoundError, UserError
from falcon_dist.engine import peak
from falcon_dist.engine.adamw import PIECE, MasterAdamW
from falcon_dist.engine.peak import Gauge, gemm_gflops, slow_bf16, step_flops
from falcon_dist.loop import PackedTrainer
from falcon_dist.order import plan_schedule
from falcon_dist.profiling import ProfileCallback, check_profile
from falcon_dist.soundness import Soundness, gradient_norm
from falcon_dist.step_clock import PARTS, StepClock
from falcon_dist.world import World


class Hands:
    """A clock that a test turns."""

    time = 0.0

    def __call__(self) -> float:
        return self.time


def test_time_is_told_apart_by_part_and_taken_once() -> None:
    hands = Hands()
    clock = StepClock(hands)
    with clock.part("communicate", without="load"):
        with clock.part("load"):
            hands.time += 2
        hands.time += 1
    with clock.backward():
        with clock.part("forward"):
            hands.time += 10
        hands.time += 20
        clock.ready = hands()
        hands.time += 5
    clock.add("optimize", 3)
    assert clock.take() == {"load": 2, "forward": 10, "backward": 20, "communicate": 6, "optimize": 3}
    assert clock.take() == dict.fromkeys(PARTS, 0.0)


def test_operations_of_a_step_count_every_product_once() -> None:
    tied, untied = make_model(llama()), make_model(llama(tie_word_embeddings=False))
    matrices = sum(p.numel() for p in tied.parameters() if p.ndim >= 2)
    assert step_flops(tied) == step_flops(untied) == 6 * matrices
    frozen = make_model(falcon_7b()).requires_grad_(False)
    assert step_flops(frozen) == 4 * sum(p.numel() for p in frozen.parameters() if p.ndim >= 2)


def test_share_of_the_peak() -> None:
    assert Gauge(gflops=100, flops_per_token=10**9).share(tokens=50, seconds=1) == 0.5
    assert 0 < gemm_gflops(torch.float32, side=64, budget_s=0.0) < math.inf
    assert slow_bf16(200, 100) is None
    assert "bf16 is slower than fp32 on this processor: 40 against 100 GFLOP/s" in str(slow_bf16(40, 100))


@pytest.mark.parametrize("multiplies", [True, False])
def test_the_peak_is_of_what_is_multiplied(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "multiplies_bf16", lambda: multiplies)
    monkeypatch.setattr(peak, "gemm_gflops", lambda dtype, *_: {torch.float32: 100.0, torch.bfloat16: 300.0}[dtype])
    found, lines = peak.gauge(make_model(llama()), "bf16")
    assert (found.gflops, peak.WIDENED in lines) == ((300, False) if multiplies else (100, True))
    found, lines = peak.gauge(make_model(llama()), "fp32")
    assert (found.gflops, lines) == (100, ["GEMM peak of a rank: 100 GFLOP/s in fp32"])


def soundness(world_size: int = 2) -> Soundness:
    world = World(rank=1, local_rank=1, world_size=world_size, local_world_size=world_size)
    schedule = plan_schedule(LoopConfig(global_batch=4), num_rows=8, world_size=world_size, seed=0)
    return Soundness(schedule, world, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_step_rank_and_rows(value: float) -> None:
    checked = soundness()
    checked.step = 2
    checked.check_loss(torch.tensor(1.0))
    with pytest.raises(UnsoundError, match=rf"loss is {value} at step 2: rank 1 had rows \[\d, \d\]"):
        checked.check_loss(torch.tensor(value))


def test_a_norm_is_taken_in_fp32_over_all_gradients() -> None:
    params = [torch.zeros(1000, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    for param in params[:2]:
        param.grad = torch.full_like(param, 0.1)
    wanted = float(torch.cat([p.grad.double() for p in params[:2] if p.grad is not None]).norm())
    assert float(gradient_norm(params)) == pytest.approx(wanted, rel=1e-6)


def told_by(monkeypatch: pytest.MonkeyPatch, *others: float | None) -> None:
    """What each rank says in a gather; None: what this one does."""

    def gather(told: list[torch.Tensor], mine: torch.Tensor) -> None:
        for place, other in zip(told, others, strict=True):
            place.copy_(mine if other is None else torch.tensor([other]))

    monkeypatch.setattr(dist, "all_gather", gather)


def test_all_ranks_clip_by_the_norm_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own differ in a last bit where their processors sum in other orders."""
    params = torch.nn.ParameterList([torch.zeros(1000)])
    params[0].grad = torch.full((1000,), 2.0)
    own = gradient_norm(list(params))
    first = float(torch.nextafter(own, torch.tensor(math.inf)))
    told_by(monkeypatch, first, None)
    trainer = PackedTrainer.__new__(PackedTrainer)
    optimizer = MasterAdamW([{"params": list(params)}], lr=1e-2)
    trainer.optimizer, trainer._clock, trainer._soundness = optimizer, StepClock(), soundness()
    trainer.args = SimpleNamespace(max_grad_norm=1.0)
    assert float(trainer._clip_grad_norm(params)) == first != float(own)
    assert optimizer._divisor == first + 1e-6


@pytest.mark.parametrize("told", [(1.5, math.nan), (math.inf, None)])
def test_a_norm_that_is_not_finite_anywhere_is_that_of_all(
    told: tuple[float | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    told_by(monkeypatch, *told)
    norm = float(soundness().agreed(torch.tensor(1.5)))
    assert not math.isfinite(norm)
    assert float(soundness(world_size=1).agreed(torch.tensor(1.5))) == 1.5
    told_by(monkeypatch, 0.0, 1.0)
    with pytest.raises(UnsoundError, match=rf"^gradient norm is {norm} at step 0: rank 0 had rows \[\d, \d\]$"):
        soundness().check_norm(norm, lambda: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_and_pieces_are_torchs_own_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start, grad = torch.randn(PIECE + 100).to(dtype), torch.randn(PIECE + 100).to(dtype)
    ours, theirs = start.clone().requires_grad_(), start.float().clone().requires_grad_()
    first, second = MasterAdamW([{"params": [ours]}], lr=1e-2), torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        ours.grad, theirs.grad = grad.clone(), grad.float()
        first.clip(float(gradient_norm([ours])), 1.0)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        first.step()
        second.step()
    assert torch.allclose(first.state[ours].get("master", ours), theirs, rtol=0, atol=1e-6)
    assert torch.equal(ours, first.state[ours].get("master", ours).to(dtype))


def test_traces_longer_than_the_run_are_refused() -> None:
    check_profile(3, 5)
    with pytest.raises(UserError, match=r"report.profile: 4 steps after 2 to warm up are more than the 5"):
        check_profile(4, 5)
    with pytest.raises(UserError, match=r"report.profile: must be 0 or more: -1"):
        check_profile(-1, 5)


@pytest.mark.parametrize("last", [4, 7])
def test_a_trace_is_written_also_where_training_stops_early(tmp_path: Path, last: int) -> None:
    told: list[str] = []
    callback = ProfileCallback(4, tmp_path, told.append)
    args, control = TrainingArguments(output_dir=str(tmp_path)), TrainerControl()
    for step in range(last):
        callback.on_step_begin(args, TrainerState(global_step=step), control)
        torch.ones(2).sum()
        callback.on_step_end(args, TrainerState(global_step=step + 1), control)
    callback.on_train_end(args, TrainerState(global_step=last), control)
    assert told == [f"trace of {min(4, last - 2)} steps: {tmp_path}/trace.json.gz"]
    assert (tmp_path / "trace.json.gz").stat().st_size > 0
