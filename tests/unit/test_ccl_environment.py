"""The variables oneCCL and libfabric are given."""

from __future__ import annotations

import subprocess
import sys

import pytest

from falcon_dist.ccl_environment import environment, lacking
from falcon_dist.contract import UserError


def test_a_rank_without_reserved_cores_works_inside_its_calls() -> None:
    env = environment(local_rank=1, local_size=2, interface="eth0", library_folder="/x/lib")
    assert env == {
        "CCL_ATL_TRANSPORT": "ofi",
        "CCL_ATL_SHM": "1",
        "CCL_PROCESS_LAUNCHER": "none",
        "CCL_LOCAL_RANK": "1",
        "CCL_LOCAL_SIZE": "2",
        "CCL_LOG_LEVEL": "error",
        "FI_PROVIDER": "tcp",
        "FI_PROVIDER_PATH": "/x/lib",
        "CCL_KVS_IFACE": "eth0",
        "FI_TCP_IFACE": "eth0",
        "CCL_WORKER_OFFLOAD": "0",
    }


def test_a_lone_rank_of_a_host_takes_no_shared_memory() -> None:
    assert environment(local_rank=0, local_size=1, interface="eth0")["CCL_ATL_SHM"] == "0"


def test_every_rank_gets_the_same_list_of_workers() -> None:
    ranks = [
        environment(
            local_rank=rank,
            local_size=2,
            interface="lo",
            comm_cpus=[[0, 1], [16, 17]],
            comm_mem_nodes=[0, 1],
        )
        for rank in (0, 1)
    ]
    for env in ranks:
        assert env["CCL_WORKER_OFFLOAD"] == "1"
        assert env["CCL_WORKER_COUNT"] == "2"
        assert env["CCL_WORKER_AFFINITY"] == "0,1,16,17"
        assert env["CCL_WORKER_MEM_AFFINITY"] == "0,0,1,1"


@pytest.mark.parametrize("cpus", [[[0]], [[0], [1, 2]]])
def test_uneven_reservations_are_refused(cpus: list[list[int]]) -> None:
    with pytest.raises(UserError, match="equally many communication cpus"):
        environment(local_rank=0, local_size=2, interface="lo", comm_cpus=cpus)


def test_what_is_set_stays() -> None:
    wanted = environment(local_rank=0, local_size=1, interface="eth0")
    assert lacking({}, wanted) == wanted
    assert "FI_PROVIDER" not in lacking({"FI_PROVIDER": "verbs"}, wanted)
    assert "CCL_WORKER_OFFLOAD" not in lacking({"CCL_WORKER_AFFINITY": "3"}, wanted)


@pytest.mark.parametrize("module", ["ccl_environment", "ccl_recipe"])
def test_the_launcher_can_import_it_without_torch(module: str) -> None:
    code = f"import sys; sys.path[:0] = ['.']; import falcon_dist.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
