from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from falcon_dist.packing import NO_RECORD, Sample, Tally, held_out, pack


def samples(lengths: list[int]) -> list[Sample]:
    starts = np.cumsum([0, *lengths])
    return [
        Sample(record=i, tokens=np.arange(starts[i], starts[i + 1], dtype=np.int32) + 1, mask=np.ones(n, np.uint8))
        for i, n in enumerate(lengths)
    ]


@given(lengths=st.lists(st.integers(1, 40), max_size=30), length=st.integers(2, 17))
def test_joined_rows_hold_every_token_once_in_order(lengths: list[int], length: int) -> None:
    tally = Tally()
    rows = list(pack(samples(lengths), length=length, join=True, pad=0, tally=tally))
    tokens = [int(t) for row in rows for t, r in zip(row.tokens, row.records, strict=True) if r != NO_RECORD]
    assert tokens == list(range(1, sum(lengths) + 1))
    assert all(len(row.tokens) == length for row in rows)
    assert tally.padding_tokens == len(rows) * length - sum(lengths) < length
    assert (tally.tokens, tally.cut_tokens, tally.rows) == (sum(lengths), 0, len(rows))


def test_records_mark_the_borders() -> None:
    rows = list(pack(samples([3, 4]), length=5, join=True, pad=9, tally=Tally()))
    assert rows[0].records.tolist() == [0, 0, 0, 1, 1]
    assert rows[1].records.tolist() == [1, 1, -1, -1, -1]
    assert rows[1].tokens.tolist() == [6, 7, 9, 9, 9]
    assert rows[1].mask.tolist() == [1, 1, 0, 0, 0]


def test_single_rows_count_what_is_cut() -> None:
    tally = Tally()
    rows = list(pack(samples([3, 8]), length=5, join=False, pad=0, tally=tally))
    assert [row.records.tolist() for row in rows] == [[0, 0, 0, -1, -1], [1, 1, 1, 1, 1]]
    assert (tally.cut_tokens, tally.padding_tokens) == (3, 2)


def test_split_is_by_key_and_near_its_share() -> None:
    assert {held_out("one conversation", 0.3) for _ in range(3)} == {held_out("one conversation", 0.3)}
    share = sum(held_out(str(key), 0.1) for key in range(10_000)) / 10_000
    assert 0.09 < share < 0.11
    assert not held_out("any", 0.0)
