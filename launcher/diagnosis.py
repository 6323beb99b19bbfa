"""What is wrong with hosts, and the cure, from what their agents found. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from launcher.cluster import HostFacts
from launcher.onednn import WITH_BF16, instruction_set

CLOCK_S: Final = 1.0
OPEN_FILES: Final = 1024
"""What most systems allow, and runs of some hundred ranks get by with; two ranks need less than 256."""
PROCESSES: Final = 4096
SHM_BYTES: Final = 1 << 30
DISK_BYTES: Final = 10 << 30
SLOWEST_LINK: Final = 0.5
"""Part of the median rate below which a link stands out."""
MOST_LOAD: Final = 0.5
"""Load for each cpu above which something else is running."""
ALIKE: Final = ("python", "falcon-dist", "torch", "transformers", "trl", "accelerate", "oneccl-cpu-devel")
Row = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """One host."""

    host: str
    facts: HostFacts
    examined: Mapping[str, Any]
    clock_offset_s: float
    unreached: tuple[str, ...] = ()
    """Hosts whose address it could not reach."""
    link_bytes_per_s: float | None = None
    """What came in from its neighbour while all hosts of the ring were sending; None: one host only."""


def problems(hosts: Sequence[Findings]) -> list[Row]:
    """Host, problem and cure, for every problem of every host."""
    own = [row for found in hosts for row in (*_of_limits(found), *_of_torch(found), *_of_network(found))]
    return [*own, *_skew(hosts), *_slow_links(hosts)]


def overview(hosts: Sequence[Findings]) -> list[tuple[str, ...]]:
    """A row for each host: what it is."""
    return [_row(found) for found in hosts]


def _row(found: Findings) -> tuple[str, ...]:
    topology, told = found.facts.topology, found.examined
    cores = sum(len(n.cores) for s in topology.sockets for n in s.numa_nodes)
    numa = len({n.numa_node for s in topology.sockets for n in s.numa_nodes})
    rate = "-" if found.link_bytes_per_s is None else f"{found.link_bytes_per_s / 1e6:.0f} MB/s"
    return (
        found.host,
        f"{len(topology.sockets)} x {numa} x {cores}",
        str(len(topology.allowed)),
        f"{told['memory_bytes'] / (1 << 30):.0f} GiB",
        str(told["isa"]),
        _shown_kernel(told["torch"]),
        f"{1000 * found.clock_offset_s:+.0f} ms",
        rate,
        _shown_reduction(told["torch"].get("all_reduce", {})),
    )


HEAD: Final = (
    "host",
    "sockets x NUMA x cores",
    "cpus",
    "memory",
    "ISA",
    "oneDNN's bf16 kernel",
    "clock",
    "link",
    "all_reduce",
)


def _shown_kernel(told: Mapping[str, Any]) -> str:
    """What a bf16 linear layer ran on: "AMX: brg_matmul:avx512_core_amx"."""
    if "bf16_kernel" not in told:
        return "-"
    kernel: str | None = told["bf16_kernel"]
    return f"{instruction_set(kernel)}: {kernel or 'bf16 is widened to fp32'}"


def _shown_reduction(told: Mapping[str, Any]) -> str:
    if not told:
        return "-"
    return "fails" if "fault" in told else f"{told['bytes_per_s'] / 1e6:.0f} MB/s ({told['backend']})"


def _of_limits(found: Findings) -> list[Row]:
    told, host = found.examined, found.host
    cpus = max(1, len(found.facts.topology.cpus))  # all, for the load is that of the whole machine
    checks = (
        (abs(found.clock_offset_s) > CLOCK_S, f"clock {found.clock_offset_s:+.1f} s off", "start chrony or ntpd"),
        (0 <= told["open_files"] < OPEN_FILES, f"open files limited to {told['open_files']}", "raise ulimit -n"),
        (0 <= told["processes"] < PROCESSES, f"processes limited to {told['processes']}", "raise ulimit -u"),
        (
            told["shm_bytes"] < SHM_BYTES,
            f"shared memory (/dev/shm): {told['shm_bytes'] / 1e9:.1f} GB left",
            "mount it larger (containers: --shm-size)",
        ),
        (
            told["disk_bytes"] < DISK_BYTES,
            f"{told['disk_bytes'] / 1e9:.1f} GB of disk left at {told['place']}",
            "free some, or set --runs-dir",
        ),
        (not told["writable"], f"{told['place']} cannot be written", "set --runs-dir"),
        (told["load"] / cpus > MOST_LOAD, f"load {told['load']:.1f} on {cpus} cpus", "end what else runs there"),
    )
    return [(host, problem, cure) for wrong, problem, cure in checks if wrong]


def _of_torch(found: Findings) -> list[Row]:
    told, host = found.examined["torch"], found.host
    if not told:
        return []
    if "fault" in told:
        return [(host, f"torch does not work: {told['fault']}", "install falcon-dist there again")]
    rows = []
    if leak := told.get("leak"):
        rows.append((host, f"packed samples see each other ({leak:g})", "install the pinned transformers"))
    if fault := told.get("all_reduce", {}).get("fault"):
        cure = "open all ports between the hosts; give each a name of its own"
        rows.append((host, f"all_reduce with the other hosts fails: {fault}", cure))
    ran_on = instruction_set(told["bf16_kernel"])
    if found.examined["isa"] in ("avx512_bf16", "amx_bf16") and ran_on not in WITH_BF16:
        rows.append((host, f"bf16 products run on {ran_on} ({told['bf16_kernel']})", "unset ONEDNN_MAX_CPU_ISA"))
    return rows


def _of_network(found: Findings) -> list[Row]:
    if not found.unreached:
        return []
    return [(found.host, f"does not reach {', '.join(found.unreached)}", "open the firewall between them, all ports")]


def _skew(hosts: Sequence[Findings]) -> list[Row]:
    kinds = {"falcon-dist code": [f.examined["code"] for f in hosts]}
    for name in ALIKE:
        kinds[name] = [f.facts.versions.get(name, "none") for f in hosts]
    kinds["python"] = [".".join(f.facts.python_version.split(".")[:2]) for f in hosts]
    rows: list[Row] = []
    for name, values in kinds.items():
        usual = max(values, key=values.count)
        odd = [(f.host, value) for f, value in zip(hosts, values, strict=True) if value != usual]
        rows += [(host, f"{name} {value}, others have {usual}", f"install {usual}") for host, value in odd]
    return rows


def _slow_links(hosts: Sequence[Findings]) -> list[Row]:
    rates = sorted(f.link_bytes_per_s for f in hosts if f.link_bytes_per_s is not None)
    if len(rates) < 3:
        return []
    usual = rates[len(rates) // 2]
    return [
        (f.host, f"link {f.link_bytes_per_s / 1e6:.0f} MB/s, others {usual / 1e6:.0f}", "look at cable, port, driver")
        for f in hosts
        if f.link_bytes_per_s is not None and f.link_bytes_per_s < SLOWEST_LINK * usual
    ]
