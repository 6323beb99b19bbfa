from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_dist.config import Packing
from falcon_dist.packing import NO_RECORD, Forecast, Packer, Row, Sample, Tally, best_fit, held_out


def samples(lengths: list[int]) -> list[Sample]:
    starts = np.cumsum([0, *lengths])
    return [
        Sample(record=i, tokens=np.arange(starts[i], starts[i + 1], dtype=np.int32) + 1, mask=np.ones(n, np.uint8))
        for i, n in enumerate(lengths)
    ]


def pack(lengths: list[int], kind: Packing, length: int, pad: int = 0) -> tuple[list[Row], Tally]:
    packer = Packer(kind, length=length, pad=pad)
    rows = [row for sample in samples(lengths) for row in packer.add(sample)]
    return rows + list(packer.finish()), packer.tally


@given(lengths=st.lists(st.integers(1, 40), max_size=30), length=st.integers(2, 17))
def test_joined_rows_hold_every_token_once_in_order(lengths: list[int], length: int) -> None:
    rows, tally = pack(lengths, "wrapped", length)
    tokens = [int(t) for row in rows for t, r in zip(row.tokens, row.records, strict=True) if r != NO_RECORD]
    assert tokens == list(range(1, sum(lengths) + 1))
    assert all(len(row.tokens) == length for row in rows)
    assert tally.padding_tokens == len(rows) * length - sum(lengths) < length
    assert (tally.tokens, tally.cut_tokens, tally.rows) == (sum(lengths), 0, len(rows))


def test_records_mark_the_borders() -> None:
    rows, _ = pack([3, 4], "wrapped", 5, pad=9)
    assert rows[0].records.tolist() == [0, 0, 0, 1, 1]
    assert rows[1].records.tolist() == [1, 1, -1, -1, -1]
    assert rows[1].tokens.tolist() == [6, 7, 9, 9, 9]
    assert rows[1].mask.tolist() == [1, 1, 0, 0, 0]


def test_single_rows_count_what_is_cut() -> None:
    rows, tally = pack([3, 8], "off", 5)
    assert [row.records.tolist() for row in rows] == [[0, 0, 0, -1, -1], [1, 1, 1, 1, 1]]
    assert (tally.cut_tokens, tally.padding_tokens) == (3, 2)


def test_tokens_that_begin_a_run_are_not_counted_as_learned() -> None:
    assert pack([3, 4], "wrapped", 5)[1].loss_tokens == 2 + 1 + 1
    _, tally = pack([1, 1], "off", 5)
    assert (tally.loss_tokens, tally.silent_rows) == (0, 2)


@given(lengths=st.lists(st.integers(1, 40), max_size=60), length=st.integers(2, 17))
def test_best_fit_breaks_no_sample_and_loses_only_what_is_longer_than_a_row(lengths: list[int], length: int) -> None:
    rows, tally = pack(lengths, "best-fit", length)
    kept = [int(t) for row in rows for t, r in zip(row.tokens, row.records, strict=True) if r != NO_RECORD]
    starts = np.cumsum([0, *lengths]) + 1
    wanted = [t for n, s in zip(lengths, starts, strict=False) for t in range(s, s + min(n, length))]
    assert sorted(kept) == wanted
    assert tally.cut_tokens == sum(max(0, n - length) for n in lengths)
    places: dict[int, int] = {}
    for number, row in enumerate(rows):
        for record in set(row.records.tolist()) - {NO_RECORD}:
            assert places.setdefault(record, number) == number


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    # 7 and 6 open rows with room for 3 and 4; 3 fits both and goes where nothing is left over.
    assert best_fit([6, 3, 7, 4], 10) == [[2, 1], [0, 3]]
    assert best_fit([10, 10], 10) == [[0], [1]]


def test_windows_keep_rows_bounded_and_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("falcon_dist.packing.WINDOW_TOKENS", 40)
    packer = Packer("best-fit", length=10, pad=0)
    first = [len(list(packer.add(sample))) for sample in samples([6, 4] * 8)]
    assert first == [0] * 7 + [4] + [0] * 7 + [4]
    assert list(packer.finish()) == []


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), length=st.integers(2, 17))
def test_forecast_is_what_each_way_makes(lengths: list[int], length: int) -> None:
    forecast = Forecast(length)
    for n in lengths:
        forecast.add(n)
    result = forecast.result()
    for kind in ("wrapped", "best-fit", "off"):
        rows, tally = pack(lengths, kind, length)
        told = result[kind]
        assert (told["rows"], told["padding"], told["cut"]) == (len(rows), tally.padding_tokens, tally.cut_tokens)
    wrapped, _ = pack(lengths, "wrapped", length)
    seen = [record for row in wrapped for record in set(row.records.tolist()) - {NO_RECORD}]
    assert result["wrapped"]["broken"] == sum(seen.count(i) > 1 for i in range(len(lengths)))


def test_split_is_by_key_and_near_its_share() -> None:
    assert {held_out("one conversation", 0.3) for _ in range(3)} == {held_out("one conversation", 0.3)}
    share = sum(held_out(str(key), 0.1) for key in range(10_000)) / 10_000
    assert 0.09 < share < 0.11
    assert not held_out("any", 0.0)
