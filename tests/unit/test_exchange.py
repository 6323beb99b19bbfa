"""What falcon doctor is told where hosts cannot exchange anything."""

from __future__ import annotations

import pytest

from falcon_dist.exchange import exchange


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (RuntimeError("no route to host\nmore"), "no route to host"),
        (RuntimeError("\n"), "RuntimeError"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_fault_is_one_line_also_where_it_says_nothing(monkeypatch, error: Exception, fault: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("falcon_dist.exchange.open_group", fail)
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    assert exchange(env) == {"fault": fault}
