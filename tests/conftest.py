"""Marks the tests of the oneCCL backend, which a machine without a C++ compiler leaves out by name."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ccl" in item.nodeid:
            item.add_marker("ccl")
