"""Marks the tests of the oneCCL backend, which a machine without a C++ compiler leaves out by name."""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    # Under nohup an ignored SIGHUP would be handed to all that tests start; a handler is not handed on.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


LONGEST = ("test_training.py", "test_saves.py", "test_emergency.py", "test_zero.py")
"""Files that are begun first, so that workers, who take whole files, end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    for item in items:
        if "ccl" in item.nodeid:
            item.add_marker("ccl")
