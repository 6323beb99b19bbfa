"""Reads a machine's sysfs, affinity mask and CPU quota once into a Topology."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from launcher.cpuset import CpuSet
from launcher.errors import UserError
from launcher.topology import Core, NumaNode, Socket, Topology

ROOT: Final = Path("/")


def load_for(hosts: Sequence[str], given: Iterable[str]) -> dict[str, Topology]:
    """Saved topologies by host; each given as PATH (for all hosts) or HOST=PATH.

    Raises:
        UserError: no such host, or no topology there.
    """
    found: dict[str, Topology] = {}
    for text in given:
        host, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            found |= dict.fromkeys(hosts, load(Path(text)))
        elif host in hosts:
            found[host] = load(Path(path))
        else:
            raise UserError(f'--topology: no such host in this run: "{host}"; hosts: {", ".join(hosts)}')
    return found


def load(path: Path) -> Topology:
    """A saved topology: a folder that holds ``sys/devices/system``, or the JSON of `falcon topology`.

    Raises:
        UserError: neither of them.
    """
    if path.is_dir():
        try:
            return read(path)
        except ValueError as fault:
            raise UserError(f'--topology: holds what no kernel writes: "{path}"; {fault}') from fault
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as fault:
        raise UserError(f'--topology: cannot be read: "{path}"; {fault}') from fault
    if not isinstance(values, dict):
        raise UserError(f'--topology: no topology as `falcon topology` prints it: "{path}"')
    return Topology.from_json(values, f"--topology {path}")


def read(root: Path = ROOT) -> Topology:
    """The topology below ``root``, which is the running machine's unless a test or ``--topology`` says otherwise.

    Raises:
        UserError: there is no sys/devices/system/cpu below ``root``.
    """
    online = _online(root)
    nodes = _numa_cpus(root)
    sockets, bare = _sockets(root, online, nodes)
    return Topology(
        sockets=sockets,
        memory_only=bare,
        allowed=_allowed(root, online) & online,
        quota_cpus=_quota_cpus(root),
        offline=CpuSet.of(_numbered(root / "sys/devices/system/cpu", "cpu")) - online,
        mems_allowed=_status_list(root, "Mems_allowed_list", CpuSet.of(nodes)) & CpuSet.of(nodes),
    )


def _online(root: Path) -> CpuSet:
    folder = root / "sys/devices/system/cpu"
    if not folder.is_dir():
        raise UserError(f'--topology: holds no sys/devices/system/cpu: "{root}"')
    text = _text(folder / "online")
    return CpuSet.parse(text) if text else CpuSet.of(_numbered(folder, "cpu"))


def _numa_cpus(root: Path) -> dict[int, CpuSet]:
    """Every online NUMA node with its cpus; empty where the kernel has no NUMA."""
    folder = root / "sys/devices/system/node"
    numbers = _numbered(folder, "node")
    return {n: CpuSet.parse(_text(folder / f"node{n}/cpulist")) for n in numbers}


def _sockets(root: Path, online: CpuSet, nodes: dict[int, CpuSet]) -> tuple[tuple[Socket, ...], tuple[NumaNode, ...]]:
    node_of = {cpu: n for n, cpus in nodes.items() for cpu in cpus}
    found: dict[int, dict[int, dict[CpuSet, Core]]] = defaultdict(lambda: defaultdict(dict))
    for cpu in online:
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = _siblings(folder, cpu) & online
        core = Core(core=_number(folder / "core_id", cpu), cpus=siblings)
        # One kernel without NUMA is one memory domain: number 0.
        found[_number(folder / "physical_package_id", 0)][node_of.get(cpu, 0)][siblings] = core
    sockets = tuple(
        Socket(
            socket=s,
            numa_nodes=tuple(_numa_node(root, n, tuple(cores.values())) for n, cores in sorted(by_node.items())),
        )
        for s, by_node in sorted(found.items())
    )
    return sockets, tuple(_numa_node(root, n, ()) for n, cpus in sorted(nodes.items()) if not cpus & online)


def _numa_node(root: Path, number: int, cores: tuple[Core, ...]) -> NumaNode:
    text = _text(root / f"sys/devices/system/node/node{number}/meminfo")
    total = re.search(r"MemTotal:\s+(\d+) kB", text)
    memory = int(total[1]) * 1024 if total else None
    return NumaNode(numa_node=number, cores=cores, memory_bytes=memory)


def _siblings(folder: Path, cpu: int) -> CpuSet:
    text = _text(folder / "thread_siblings_list") or _text(folder / "core_cpus_list")
    return CpuSet.parse(text) | CpuSet.of([cpu])


def _allowed(root: Path, online: CpuSet) -> CpuSet:
    # The kernel has already cut the mask of a live process down to its cpuset.
    return CpuSet.of(os.sched_getaffinity(0)) if root == ROOT else _status_list(root, "Cpus_allowed_list", online)


def _status_list(root: Path, name: str, default: CpuSet) -> CpuSet:
    line = re.search(rf"^{name}:[ \t]*(\S*)", _text(root / "proc/self/status"), re.MULTILINE)
    return CpuSet.parse(line[1]) if line else default


def _quota_cpus(root: Path) -> float | None:
    """The tightest CPU quota on the way from this process's cgroup up to the root (v1 and v2)."""
    limits = [limit for folder in _cgroup_folders(root) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _cgroup_folders(root: Path) -> list[Path]:
    base = root / "sys/fs/cgroup"
    folders = [base, base / "cpu", base / "cpu,cpuacct"]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        steps = [p for p in path.split("/") if p and p != ".."]
        mounts = (base / "cpu", base / "cpu,cpuacct") if controllers else (base,)
        folders += [m.joinpath(*steps[:depth]) for m in mounts for depth in range(1, len(steps) + 1)]
    return folders


def _limit(folder: Path) -> float | None:
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    if not quota.isdigit():  # "max", "-1" or nothing at all
        return None
    return int(quota) / int(period or 100_000)


def _numbered(folder: Path, prefix: str) -> list[int]:
    names = [p.name.removeprefix(prefix) for p in folder.glob(f"{prefix}[0-9]*")]
    return sorted(int(n) for n in names if n.isdigit())


def _number(path: Path, default: int) -> int:
    text = _text(path)
    return int(text) if text.isdigit() else default  # virtual machines say -1 for "not known"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
