"""Writes sysfs trees of machines we do not have."""

from __future__ import annotations

from pathlib import Path

from launcher.cpuset import CpuSet


def write_tree(
    root: Path,
    *,
    sockets: int = 1,
    nodes_per_socket: int = 1,
    cores_per_node: int | list[int] = 4,
    smt: int = 1,
    adjacent: bool = False,
    node_ids: list[int] | None = None,
    memory_only: tuple[int, ...] = (),
    numa: bool = True,
    offline: str = "",
    allowed: str | None = None,
    mems_allowed: str | None = None,
    cpu_max: str | None = None,
) -> Path:
    """A folder that sysfs.read() takes. ``adjacent``: the threads of a core are neighbours (0,1), as on many clouds."""
    num_nodes = sockets * nodes_per_socket
    sizes = [cores_per_node] * num_nodes if isinstance(cores_per_node, int) else cores_per_node
    node_of = [node for node, size in enumerate(sizes) for _ in range(size)]
    num_cores = len(node_of)
    online = CpuSet.of(range(num_cores * smt)) - CpuSet.parse(offline)
    ids = node_ids or list(range(num_nodes))
    put(root, "sys/devices/system/cpu/online", online)
    of_node: dict[int, set[int]] = {node: set() for node in ids}
    for core in range(num_cores):
        threads = [core * smt + t if adjacent else core + t * num_cores for t in range(smt)]
        node = node_of[core]
        of_node[ids[node]] |= set(threads) & online.ids
        for cpu in threads:
            folder = f"sys/devices/system/cpu/cpu{cpu}"
            put(root, f"{folder}/online", int(cpu in online))
            if cpu in online:
                put(root, f"{folder}/topology/physical_package_id", node // nodes_per_socket)
                put(root, f"{folder}/topology/core_id", core % (max(sizes) * nodes_per_socket))
                put(root, f"{folder}/topology/thread_siblings_list", CpuSet.of(threads) & online)
    if numa:
        for node in (*ids, *memory_only):
            put(root, f"sys/devices/system/node/node{node}/cpulist", CpuSet.of(of_node.get(node, ())))
            put(root, f"sys/devices/system/node/node{node}/meminfo", f"Node {node} MemTotal:  1024 kB")
    if allowed is not None or mems_allowed is not None:
        mems = mems_allowed or CpuSet.of((*ids, *memory_only))
        put(root, "proc/self/status", f"Cpus_allowed_list:\t{allowed or online}\nMems_allowed_list:\t{mems}")
    if cpu_max is not None:
        put(root, "sys/fs/cgroup/cpu.max", cpu_max)
    return root


def put(root: Path, path: str, value: object) -> None:
    """One file of the tree."""
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"{value}\n")
