"""System calls by which a process is bound and tied to its parent. Linux only; numactl is not needed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from launcher.cpuset import CpuSet
from launcher.errors import LaunchError

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
MPOL_DEFAULT: Final = 0
MPOL_BIND: Final = 2
SET_MEMPOLICY: Final = {"x86_64": 238, "aarch64": 237, "ppc64le": 261, "s390x": 270}
"""System call numbers: the C library has no function for this one."""
HELD_S: Final = 5.0
"""How long a process may take to end that was killed."""
REFUSALS: Final = (errno.EPERM, errno.ENOSYS)
"""What containers (seccomp) and kernels without NUMA answer."""

_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Makes this process the parent of descendants that lose theirs, so that it can end them."""
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with(parent: int, number: int = signal.SIGKILL) -> None:
    """For a fresh child: this signal when ``parent``, the process that forked it, is gone."""
    _libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it went before the call above
        os.kill(os.getpid(), number)


@contextlib.contextmanager
def bound(cpus: CpuSet, mem_nodes: CpuSet) -> Iterator[str | None]:
    """Binds this process, and thereby what it starts, for the length of the block.

    Yields why the memory policy was refused, or None. Empty ``mem_nodes``: memory is not bound.

    Raises:
        LaunchError: the cpus cannot be had on this machine.
    """
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as fault:
        raise LaunchError(
            f'cannot bind to cpus "{cpus}": {fault.strerror}; allowed are "{CpuSet.of(before)}"'
        ) from fault
    try:
        yield set_memory_policy(MPOL_BIND, mem_nodes) if mem_nodes else None
    finally:
        os.sched_setaffinity(0, before)
        if mem_nodes:
            set_memory_policy(MPOL_DEFAULT, CpuSet())


def set_memory_policy(mode: int, mem_nodes: CpuSet) -> str | None:
    """set_mempolicy(2) for this process; returns why it was refused, or None.

    Raises:
        LaunchError: the kernel knows no such nodes.
    """
    number = SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return f"no system call number for {platform.machine()}"
    bits = max(mem_nodes, default=0) + 1
    words = (ctypes.c_ulong * (bits // 64 + 1))()
    for node in mem_nodes:
        words[node // 64] |= 1 << (node % 64)
    # The kernel reads one bit less than it is told.
    if _libc.syscall(number, mode, words if mem_nodes else None, ctypes.c_ulong(bits + 1)) == 0:
        return None
    fault = ctypes.get_errno()
    if fault in REFUSALS:
        return os.strerror(fault)
    raise LaunchError(f'cannot bind memory to NUMA nodes "{mem_nodes}": {os.strerror(fault)}')


def observed_cpus(pid: int) -> str | None:
    """The affinity mask the kernel holds for a process, as "0-3,8"; None: it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    rows = (line.partition(":") for line in status.splitlines())
    return next((value.strip() for name, _, value in rows if name == "Cpus_allowed_list"), None)


def end_orphans(keep: Collection[int] = ()) -> tuple[int, ...]:
    """Kills what this process has adopted: all its children but ``keep``, until no more come up.

    Returns:
        Those that did not end within HELD_S: the kernel holds them.
    """
    deadline, pause = time.monotonic() + HELD_S, 0.001
    while orphans := [pid for pid in _children() if pid not in keep]:
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            return tuple(orphans)
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    return ()


def _children() -> list[int]:
    """Process ids of this process's children; empty where the kernel does not list them."""
    try:
        text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    except OSError:
        return []
    return [int(pid) for pid in text.split()]
