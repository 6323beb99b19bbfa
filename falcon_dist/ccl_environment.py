"""The environment oneCCL and libfabric read: one pure function, for the launcher and for a lone rank.

Standard library only; importing it does not import torch (``falcon_dist.ccl`` does).

Sources: oneCCL environment variables
https://uxlfoundation.github.io/oneCCL/env-variables.html, libfabric fi_tcp(7); the reasons that were
measured are in docs/oneccl.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal

from falcon_dist.contract import UserError

Provider = Literal["tcp", "verbs", "psm3", "efa", "mlx"]

INTERFACE: Final = "FI_TCP_IFACE"
"""Where libfabric's tcp provider listens and connects."""
LIBRARY_FOLDER: Final = "FI_PROVIDER_PATH"
"""Folder of libfabric's providers, which PyPI's wheels install beside libccl."""
WORKER_CPUS: Final = "CCL_WORKER_AFFINITY"
"""Host-wide list of the cpus of all ranks' worker threads; unset where no cores are reserved."""


def environment(
    *,
    local_rank: int,
    local_size: int,
    interface: str,
    library_folder: str | None = None,
    comm_cpus: Sequence[Sequence[int]] = (),
    comm_mem_nodes: Sequence[int] = (),
    provider: Provider = "tcp",
) -> dict[str, str]:
    """What one rank's process needs before libccl is loaded.

    ``local_rank`` of ``local_size`` ranks on this host; ``interface`` is the network interface that
    routes to the master address ("lo" for loopback); ``library_folder`` holds libfabric's providers
    (None: the rank finds them itself). ``comm_cpus`` are the cpus reserved for communication, one list per
    local rank, all of one length: libccl wants the same host-wide list on every rank. Without them oneCCL
    runs without worker threads and works inside the calls: a worker polls, and on a core that also
    computes it costs a scheduler quantum per collective. ``comm_mem_nodes`` is one NUMA node per local
    rank for the workers' memory.

    Raises UserError where the lists do not fit the ranks.
    """
    env = {
        "CCL_ATL_TRANSPORT": "ofi",
        # The short path inside a host; useless and slower to start where a rank is alone.
        "CCL_ATL_SHM": "1" if local_size > 1 else "0",
        "CCL_PROCESS_LAUNCHER": "none",
        "CCL_LOCAL_RANK": str(local_rank),
        "CCL_LOCAL_SIZE": str(local_size),
        "CCL_LOG_LEVEL": "error",
        "FI_PROVIDER": provider,
        "CCL_KVS_IFACE": interface,
        INTERFACE: interface,
    }
    if library_folder is not None:
        env[LIBRARY_FOLDER] = library_folder
    return env | _workers(local_size, comm_cpus, comm_mem_nodes)


def lacking(environ: Mapping[str, str], wanted: Mapping[str, str]) -> dict[str, str]:
    """What of the ``wanted`` variables a process with this environment is to be given."""
    # Cores are reserved: workers stay as the launcher set them.
    kept = {*environ, *(["CCL_WORKER_OFFLOAD"] if WORKER_CPUS in environ else [])}
    return {name: value for name, value in wanted.items() if name not in kept}


def _workers(local_size: int, comm_cpus: Sequence[Sequence[int]], comm_mem_nodes: Sequence[int]) -> dict[str, str]:
    if not any(comm_cpus):
        return {"CCL_WORKER_OFFLOAD": "0"}
    count = len(comm_cpus[0])
    if len(comm_cpus) != local_size or any(len(cpus) != count for cpus in comm_cpus):
        found = [len(cpus) for cpus in comm_cpus]
        raise UserError(
            f"oneCCL: {local_size} ranks of a host need equally many communication cpus each, got {found}; "
            "reserve the same number for every rank"
        )
    flat = [str(cpu) for cpus in comm_cpus for cpu in cpus]
    env = {
        "CCL_WORKER_OFFLOAD": "1",
        "CCL_WORKER_COUNT": str(count),
        WORKER_CPUS: ",".join(flat),
    }
    if comm_mem_nodes:
        if len(comm_mem_nodes) != local_size:
            raise UserError(
                f"oneCCL: {len(comm_mem_nodes)} memory nodes for {local_size} ranks of a host; give one each"
            )
        nodes = [str(node) for node in comm_mem_nodes for _ in range(count)]
        env["CCL_WORKER_MEM_AFFINITY"] = ",".join(nodes)
    return env
