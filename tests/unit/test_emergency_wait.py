"""How long a rank that lost its peers stays for its emergency checkpoint."""

from __future__ import annotations

import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from falcon_dist.contract import EMERGENCY_SIGNAL, PEER_IS_GONE
from falcon_dist.emergency import Emergency


@pytest.fixture
def signals() -> Iterator[None]:
    """As they were, afterwards."""
    before = signal.getsignal(EMERGENCY_SIGNAL), signal.set_wakeup_fd(-1)
    yield
    signal.signal(EMERGENCY_SIGNAL, before[0])
    signal.set_wakeup_fd(before[1])


@pytest.mark.parametrize(
    "error", ["the process of rank 1 has ended (a peer is gone or out of reach)", "in other words"]
)
def test_a_rank_that_was_asked_stays_until_it_has_answered(signals: None, error: str) -> None:
    told: list[str] = []
    reporter = SimpleNamespace(takes=told.append, checkpoint=lambda *_, **__: told.append("committed"))

    def save() -> tuple[Path, int]:
        time.sleep(0.3)
        return Path("step-000003"), 3

    emergency = Emergency(save, reporter)  # type: ignore[arg-type]
    emergency.offer()
    os.kill(os.getpid(), EMERGENCY_SIGNAL)
    time.sleep(0.1)
    assert emergency.wait_after(RuntimeError(error))
    assert told == ["save", "committed"]


def test_an_error_of_its_own_ends_a_rank_at_once(signals: None) -> None:
    reporter = SimpleNamespace(takes=lambda _: None)
    emergency = Emergency(lambda: (Path(), 0), reporter)  # type: ignore[arg-type]
    emergency.offer()
    started = time.monotonic()
    assert not emergency.wait_after(ValueError("shapes differ"))
    assert time.monotonic() - started < 5


STORE = """
import datetime, sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", 0, 2, True, datetime.timedelta(seconds=30), wait_for_workers=False)
print(store.port, flush=True)
time.sleep(60)
"""


def test_what_the_store_says_when_its_server_has_died_is_known() -> None:
    words = [sys.executable, "-c", STORE]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        store = TCPStore("127.0.0.1", port, 2, False, datetime.timedelta(seconds=30))
        store.add("x", 1)
        server.kill()
        server.wait()
        for _ in range(2):  # the second time it has other words
            with pytest.raises(RuntimeError) as error:
                store.add("x", 1)
            assert any(sign in str(error.value) for sign in PEER_IS_GONE), str(error.value)
