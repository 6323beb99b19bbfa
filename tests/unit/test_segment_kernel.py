"""The kernel of attention, where the processor has its instruction, against the mathematics in double precision."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess

import pytest
import torch
from torch import Tensor

from falcon_dist.engine.attention import segment_attention, segment_attention_backward
from falcon_dist.engine.linear import has_tiles
from falcon_dist.engine.segment_kernel import serves


def has_pairs() -> bool:
    """Whether there is a compiler that makes code for AVX-512 with bf16 on this processor."""
    compiler = shutil.which(os.environ.get("CXX") or "g++")
    if compiler is None:
        return False
    argv = [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
    return "__AVX512BF16__" in subprocess.run(argv, capture_output=True, text=True, check=True).stdout


EXPECTED = has_pairs() and not has_tiles()
kernel = pytest.mark.skipif(not EXPECTED, reason="no AVX-512 with bf16 without AMX, or no compiler for it")
SCALE = 0.2


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def heads_of(batch: int, heads: int, groups: int, length: int, width: int) -> tuple[Tensor, ...]:
    """Queries and their gradient, and keys and values as they lie in a fused projection."""
    torch.manual_seed(0)
    query, grad = (torch.randn(batch, length, heads, width).bfloat16().transpose(1, 2) for _ in range(2))
    fused = torch.randn(batch, length, 2 * groups + 1, width).bfloat16()
    key, value = (fused[:, :, at : at + groups].transpose(1, 2) for at in (0, groups))
    return query, key, value, grad


def places(length: int, *cuts: list[int]) -> Tensor:
    """Positions of rows that are cut there."""
    rows = [[0, *cut, length] for cut in cuts]
    return torch.cat([torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(r)])[None] for r in rows])


def plain(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp with a mask."""
    length, sharing = query.shape[2], query.shape[1] // key.shape[1]
    record = (positions == 0).cumsum(1)
    seen = (record[:, :, None] == record[:, None, :]) & torch.ones(length, length).tril().bool()
    scores = query @ key.repeat_interleave(sharing, 1).transpose(2, 3) * SCALE
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return scores.softmax(-1) @ value.repeat_interleave(sharing, 1), scores.logsumexp(-1)


def test_it_serves_where_its_instruction_is_and_nothing_that_it_cannot_read() -> None:
    query, key, value, _ = heads_of(1, 4, 2, 9, 32)
    assert serves(query, key, value) == EXPECTED
    assert not serves(query.float(), key.float(), value.float())
    assert not serves(query[..., :24], key[..., :24], value[..., :24])
    assert not serves(query, key[..., :16], value[..., :16])
    assert not serves(query.mT.contiguous().mT, key, value)


@kernel
@pytest.mark.parametrize(
    ("shape", "cuts"),
    [
        ((2, 6, 3, 100, 16), [[5, 98], [99]]),
        ((2, 6, 3, 33, 64), [[]]),
        ((1, 9, 3, 170, 64), [[]]),
        ((3, 4, 4, 97, 80), [[1], [48], [49, 96]]),
        ((1, 16, 1, 161, 128), [[96]]),
        ((1, 71, 1, 50, 64), [[]]),
        ((2, 2, 1, 1, 32), [[]]),
    ],
)
def test_outputs_and_gradients(shape: tuple[int, int, int, int, int], cuts: list[list[int]]) -> None:
    query, key, value, grad = heads_of(*shape)
    batch, _, length, _ = query.shape
    positions = places(length, *cuts)
    out, norms = segment_attention(query, key, value, positions, SCALE)
    inputs = [x.double().requires_grad_() for x in (query, key, value)]
    wanted, sums = plain(*inputs, positions.expand(batch, -1))
    assert distance(out, wanted) < 0.003
    torch.testing.assert_close(norms.double(), sums.detach(), rtol=0, atol=1e-5)
    made = segment_attention_backward(grad, query, key, value, out, norms, positions, SCALE)
    for found, of in zip(made, torch.autograd.grad(wanted, inputs, grad.double()), strict=True):
        if length > 1:
            assert distance(found, of) < 0.005
        else:  # one key: nothing depends on scores
            torch.testing.assert_close(found.double(), of, rtol=0.004, atol=0.02)


@kernel
def test_results_are_the_same_bits_whatever_the_threads_and_the_layout() -> None:
    *_, grad = heads = heads_of(2, 6, 2, 130, 32)
    positions, threads = places(130, [40], [7, 90]), torch.get_num_threads()
    wanted: list[Tensor] = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for q, k, v, g in (heads, [x.contiguous() for x in heads], [*heads[:3], grad.mT.contiguous().mT]):
                out, norms = segment_attention(q, k, v, positions, SCALE)
                found = [out, norms, *segment_attention_backward(g, q, k, v, out, norms, positions, SCALE)]
                assert all(torch.equal(a, b) for a, b in zip(found, wanted or found, strict=True))
                wanted = wanted or found
    finally:
        torch.set_num_threads(threads)


@kernel
def test_memory_is_never_taken_for_what_it_does_not_hold() -> None:
    query, key, value, _ = heads_of(2, 4, 2, 40, 32)
    with pytest.raises(AssertionError):
        segment_attention(query, key, value, torch.arange(48)[None], SCALE)
    with pytest.raises(AssertionError):
        segment_attention(query, key, value, torch.arange(40).repeat(3, 1), SCALE)
    with pytest.raises(AssertionError):
        segment_attention(query, key[:, :, :30], value[:, :, :30], torch.arange(40)[None], SCALE)


@kernel
def test_nothing_passes_from_one_segment_to_another_and_what_is_no_number_is_told() -> None:
    query, key, value, grad = heads_of(1, 4, 2, 60, 32)
    positions = places(60, [25])
    before = segment_attention(query, key, value, positions, SCALE)
    made = segment_attention_backward(grad, query, key, value, *before, positions, SCALE)
    for odd in (query, key, value, grad):
        odd[:, :, 30] = torch.nan
    after = segment_attention(query, key, value, positions, SCALE)
    again = segment_attention_backward(grad, query, key, value, *after, positions, SCALE)
    for was, found in zip((*before, *made), (*after, *again), strict=True):
        assert torch.equal(was[:, :, :25], found[:, :, :25])
        assert found[:, :, 30].isnan().all()
