"""Three namespace hosts for the tests of a module; the parts they need must be there: nothing is skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.hosts import Hosts


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(3, tmp_path_factory.mktemp("cluster") / "c") as three:
        yield three
