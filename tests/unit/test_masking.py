"""Packed samples never see each other, on every family; packed equals alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SHAPES, VOCAB, falcon_rw, make_model

from falcon_dist.contract import UserError
from falcon_dist.masking import Masking, block_causal, check_packing, leak, positions

PACKABLE = {**SHAPES, "falcon-rw": lambda: falcon_rw(alibi=False)}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", PACKABLE)
def test_no_leak(shape: str, attention: str, batch: int) -> None:
    assert leak(make_model(PACKABLE[shape](), attention), batch=batch) == 0.0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", PACKABLE)
@torch.no_grad()
def test_packed_equals_alone(shape: str, attention: str) -> None:
    model = make_model(PACKABLE[shape](), attention)
    masking = Masking.of(model)
    torch.manual_seed(1)
    first, second = torch.randint(0, VOCAB, (1, 20)), torch.randint(0, VOCAB, (1, 30))
    packed = torch.cat([first, second], dim=1)
    records = torch.tensor([[0] * 20 + [1] * 30])
    together = model(input_ids=packed, use_cache=False, **masking.inputs(records)).logits
    for part, logits in ((first, together[:, :20]), (second, together[:, 20:])):
        alone = model(input_ids=part, use_cache=False).logits
        assert (alone - logits).abs().max() <= 1e-5


def test_the_check_sees_the_leak_it_is_there_for() -> None:
    """transformers' own Falcon with position_ids alone does leak: the reason for our mask."""
    model = make_model(SHAPES["falcon-7b"]())
    tokens = torch.randint(0, VOCAB, (1, 64))
    other = tokens.clone()
    other[:, :32] = (other[:, :32] + 7) % VOCAB
    place = positions(torch.arange(2).repeat_interleave(32)[None])
    with torch.no_grad():
        a, b = (model(input_ids=t, position_ids=place, use_cache=False).logits[:, 32:] for t in (tokens, other))
    assert (a - b).abs().max() > 1e-3


@torch.no_grad()
def test_alibi_rows_do_not_see_each_other_nor_their_padding() -> None:
    model = make_model(falcon_rw())
    masking = Masking.of(model)
    tokens = torch.randint(0, VOCAB, (2, 24))
    records = torch.zeros(2, 24, dtype=torch.int64)
    records[1, 16:] = -1
    other = tokens.clone()
    other[0] = torch.randint(0, VOCAB, (24,))
    other[1, 16:] = torch.randint(0, VOCAB, (8,))
    a, b = (model(input_ids=t, use_cache=False, **masking.inputs(records)).logits[1, :16] for t in (tokens, other))
    assert torch.equal(a, b)


def test_alibi_with_packing_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="alibi takes its position bias from a padding mask"):
        check_packing(falcon_rw(), packing=True)
    check_packing(falcon_rw(), packing=False)


def test_positions_and_mask_restart_at_borders() -> None:
    records = torch.tensor([[4, 4, 4, 7, 7, -1, -1]])
    assert positions(records).tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    mask = block_causal(records)[0, 0]
    assert mask.sum(dim=1).tolist() == [1, 2, 3, 1, 2, 1, 2]
