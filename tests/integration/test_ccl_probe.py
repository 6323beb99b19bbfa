"""The compiled probe tells what falcon_dist.host_facts tells."""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from falcon_dist import ccl_recipe
from falcon_dist.ccl.build import ensure_built
from falcon_dist.ccl_environment import environment
from launcher import environment as variables
from launcher import examine, probe


@pytest.fixture(scope="module")
def compiled() -> dict[str, str]:
    ensure_built()
    found: dict[str, str] = probe.find({})["probe"]
    assert found
    return found


def test_a_build_is_known_without_torch() -> None:
    known = ccl_recipe.find_torch()
    assert (known.version, known.commit) == (torch.__version__, torch.version.git_version)
    assert known.folder.samefile(Path(torch.__file__).parent)


def test_the_probe_tells_what_python_tells(compiled: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = exchange({})
    monkeypatch.setattr(sys, "executable", "/bin/false")
    told = exchange(compiled)
    assert [kinds(facts) for facts in told] == [kinds(facts) for facts in asked]
    for facts in told:
        assert facts["torch"] == torch.__version__
        assert facts["bf16_kernel"] == asked[0]["bf16_kernel"]
        assert facts["all_reduce"]["backend"] == "ccl"
        assert facts["all_reduce"]["bytes_per_s"] > 1e6


def test_an_interface_that_is_not_there_is_told(compiled: dict[str, str]) -> None:
    told = facts(compiled, {"MASTER_ADDR": "127.0.0.1", "FI_TCP_IFACE": "none7"})
    assert told["all_reduce"] == {"fault": 'FI_TCP_IFACE: no such interface: "none7"'}


def test_what_is_missing_of_a_seat_is_told(compiled: dict[str, str]) -> None:
    told = facts(compiled, {"MASTER_ADDR": "127.0.0.1", "FI_TCP_IFACE": "lo", "RANK": "many"})
    assert told["all_reduce"] == {"fault": 'environment: RANK must be a whole number: "many"'}


def exchange(compiled: dict[str, str]) -> list[dict[str, Any]]:
    """What two ranks tell, of which the first serves the store on a socket that it was handed."""
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor() as agents:
        sockets = (listening, None)
        asked = [agents.submit(facts, compiled, seat(n, listening), sockets[n]) for n in range(2)]
        return [one.result() for one in asked]


def seat(rank: int, listening: socket.socket) -> dict[str, str]:
    """One of two ranks of this host."""
    place = variables.Seat(rank=rank, local_rank=rank, world_size=2, local_world_size=2, node_rank=0, num_nodes=1)
    port = str(listening.getsockname()[1])
    met = variables.meeting_names(addr="127.0.0.1", port=port, run_id="test", attempt=1, served=False)
    own = environment(local_rank=rank, local_size=2, interface="lo")
    return own | variables.seat_names(place) | met | {"GLOO_SOCKET_IFNAME": "lo"}


def facts(compiled: dict[str, str], own: dict[str, str], listening: socket.socket | None = None) -> dict[str, Any]:
    told = examine.host(with_torch=True, with_leak=False, seat=own, probe=compiled, listening=listening)
    found: dict[str, Any] = told["torch"]
    return found


def kinds(value: Any) -> Any:
    """Names and types in place of values."""
    return {name: kinds(part) for name, part in value.items()} if isinstance(value, dict) else type(value).__name__
