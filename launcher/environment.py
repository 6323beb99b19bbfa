"""The environment of ranks: the only place where one is made. Nothing is inherited that is not listed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from falcon_dist import contract
from launcher.binding import Binding
from launcher.errors import UserError

CARRIED: Final = (
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TMPDIR"),
    *("VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "CC", "CXX", "GLIBC_TUNABLES"),
    *("XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "TORCHINDUCTOR_CACHE_DIR", "HF_*"),
    *("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy"),
    *("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
"""Names a rank gets from the user's environment."""

TELLTALE: Final = (
    *("OMP_*", "KMP_*", "GOMP_*", "MKL_*", "CCL_*", "FI_*", "I_MPI_*", "GLOO_*", "TORCH_*", "NCCL_*"),
    *("ONEDNN_*", "DNNL_*", "LD_PRELOAD", "PYTHONPATH", "WANDB_*", "MLFLOW_*"),
)
"""Names not carried whose owner probably meant them for the ranks: said aloud."""

_KEEPING: Final = f"glibc.malloc.trim_threshold={16 << 30}:glibc.malloc.top_pad={256 << 20}"
GLIBC_TUNED: Final = {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={4 << 30}:{_KEEPING}"}
"""glibc's malloc keeps what a step frees for the next step, instead of faulting fresh pages in (docs/engine.md)."""
GLIBC_SPARING: Final = {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={256 << 20}:{_KEEPING}"}
"""Besides, the largest blocks go back to the system: kept, they are split for small ones, and the next large one finds
no room (docs/memory.md)."""

COORDINATES: Final = (
    *(contract.RANK, contract.LOCAL_RANK, contract.WORLD_SIZE, contract.LOCAL_WORLD_SIZE),
    *(contract.GROUP_RANK, contract.GROUP_WORLD_SIZE, "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"),
    *(contract.MASTER_ADDR, contract.MASTER_PORT, contract.RUN_ID, contract.RESTART_COUNT),
    *("TORCHELASTIC_MAX_RESTARTS", contract.USE_AGENT_STORE, contract.RANK_DIR, contract.PLANNED_CPUS),
    *(contract.PLANNED_THREADS, contract.STORE_FD, contract.EVENT_FD, contract.BACKEND, contract.PREPARED),
)
"""Names that only the plan may give a value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """Where a rank sits in its world."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    num_nodes: int


def base(environ: Mapping[str, str], identity: Mapping[str, str], asked: Iterable[str]) -> dict[str, str]:
    """What every rank of a node gets: the listed names of the user's environment, and ``--env NAME[=VALUE]``.

    ``identity``: HOME and the like as they are on that node.

    Raises:
        UserError: a name asked for is not set, or is the launcher's own.
    """
    carried = {name: value for name, value in environ.items() if _matches(name, CARRIED)}
    return carried | dict(identity) | dict(_asked(item, environ) for item in asked)


def withheld(environ: Mapping[str, str], asked: Iterable[str]) -> tuple[str, ...]:
    """Names the user has set that ranks do not get although they look as if meant for them."""
    named = {item.partition("=")[0] for item in asked}
    return tuple(sorted(n for n in environ if _matches(n, TELLTALE) and n not in named))


def defaults(binding: Binding, ifname: str) -> dict[str, str]:
    """Threads, network and Python's behaviour for a process with this binding; ``--env`` may change these.

    No OMP_PROC_BIND and no KMP_AFFINITY: they would narrow the mask of the thread that forks DataLoader workers to one
    core. Threads inherit the rank's mask, which is its cores.
    """
    return {
        "OMP_NUM_THREADS": str(binding.threads),
        "MKL_NUM_THREADS": str(binding.threads),
        "KMP_BLOCKTIME": "1",  # Intel's OpenMP spins for 200 ms by default, on cores that have other work by then
        "TOKENIZERS_PARALLELISM": "false",  # ranks fork loaders; the tokenizer's own threads would not survive it
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "GLOO_SOCKET_IFNAME": ifname,  # left to itself gloo takes the interface of the host's name
    }


def seat_names(seat: Seat) -> dict[str, str]:
    """torchrun's names for a rank's coordinates."""
    return {
        contract.RANK: str(seat.rank),
        contract.LOCAL_RANK: str(seat.local_rank),
        contract.WORLD_SIZE: str(seat.world_size),
        contract.LOCAL_WORLD_SIZE: str(seat.local_world_size),
        contract.GROUP_RANK: str(seat.node_rank),
        contract.GROUP_WORLD_SIZE: str(seat.num_nodes),
        "ROLE_RANK": str(seat.rank),
        "ROLE_WORLD_SIZE": str(seat.world_size),
        "ROLE_NAME": "default",
    }


def meeting_names(*, addr: str, port: str, run_id: str, attempt: int, served: bool) -> dict[str, str]:
    """Where ranks meet; ``served``: a store of the agent's answers there, and no rank opens one."""
    return {
        contract.MASTER_ADDR: addr,
        contract.MASTER_PORT: port,
        contract.RUN_ID: run_id,
        contract.RESTART_COUNT: str(attempt - 1),
        "TORCHELASTIC_MAX_RESTARTS": "0",
    } | ({contract.USE_AGENT_STORE: "True"} if served else {})


def binding_names(binding: Binding) -> dict[str, str]:
    """The plan a rank compares its own view with."""
    return {contract.PLANNED_CPUS: str(binding.cpus), contract.PLANNED_THREADS: str(binding.threads)}


def _asked(item: str, environ: Mapping[str, str]) -> tuple[str, str]:
    name, given, value = item.partition("=")
    if name in COORDINATES:
        raise UserError(f'--env: set by the launcher for every rank: "{name}"; leave it out')
    if not given and name not in environ:
        raise UserError(f'--env: not set in this environment: "{name}"; give {name}=VALUE')
    return name, value if given else environ[name]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    # fnmatch would compile half a hundred patterns, which takes longer than all the rest of a plan.
    return any(name.startswith(p[:-1]) if p.endswith("*") else name == p for p in patterns)
