"""Marks the tests of the oneCCL backend, which a machine without a C++ compiler leaves out by name."""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    # Under nohup an ignored SIGHUP would be handed to all that tests start; a handler is not handed on.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ccl" in item.nodeid:
            item.add_marker("ccl")
