"""Checksums of replicas, and who is named where they differ."""

from __future__ import annotations

import pytest
import torch

from falcon_dist.replicas import checksums, odd_ranks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("count", [1, 7, 8, 33])
def test_every_single_bit_counts(dtype: torch.dtype, count: int) -> None:
    tensor = torch.arange(count).to(dtype)
    before = int(checksums({"a": tensor}))
    raw = tensor.view(torch.uint8)
    for place in range(len(raw)):
        for bit in range(8):
            raw[place] ^= 1 << bit
            assert int(checksums({"a": tensor})) != before
            raw[place] ^= 1 << bit
    assert int(checksums({"a": tensor})) == before


def test_parts_of_a_larger_tensor_are_read_too() -> None:
    whole = torch.arange(40, dtype=torch.bfloat16)
    assert torch.equal(checksums({"a": whole[3:30]}), checksums({"a": whole[3:30].clone()}))
    turned = torch.randn(6, 4).T
    assert torch.equal(checksums({"a": turned}), checksums({"a": turned.contiguous()}))


@pytest.mark.parametrize(
    ("sums", "odd"),
    [([5, 5, 5], []), ([5, 6, 5], [1]), ([6, 5, 5, 7], [0, 3]), ([5, 6], [0, 1]), ([5, 5, 6, 6], [0, 1, 2, 3])],
)
def test_the_minority_is_named_where_there_is_one(sums: list[int], odd: list[int]) -> None:
    assert odd_ranks(sums) == odd
