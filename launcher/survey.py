"""What the launcher checks on every host before anything is started, without importing torch."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

import falcon_dist
import launcher
from launcher import earlier, memory

ISA: Final = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""What oneDNN's kernels differ by, lowest first."""


def take(cwd: str, script: str | None, run_dir: str) -> dict[str, Any]:
    """This host's answers: whether the program is here and the same, and whether there is room for a run."""
    folder = Path(run_dir)
    exists = _is_listed(folder)
    place = folder if exists else _nearest(folder.parent)
    return {
        "code": own_code(),
        "cwd": Path(cwd).is_dir(),
        "script": _digest(Path(cwd, script)) if script is not None else None,
        "isa": isa(),
        "memory_bytes": memory.total_bytes(),
        "disk_bytes": _free_bytes(place),
        "writable": os.access(place, os.W_OK | os.X_OK),
        "place": str(place),
        "newest_step": max(map(earlier.step_of, earlier.committed(folder)), default=0) if exists else 0,
    }


def own_code() -> str:
    """Stands for every byte of this project's Python code."""
    import hashlib  # not for a --dry-run, which asks none of this

    whole = hashlib.sha256()
    for package in (falcon_dist, launcher):
        folder = Path(next(iter(package.__path__)))
        for path in sorted(folder.rglob("*.py")):
            whole.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return whole.hexdigest()[:12]


def isa() -> str:
    """The widest instruction set for matrix products that this host's processor tells of."""
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        flags = None
    known = set(flags[1].split()) if flags else set()
    return next((name for name in reversed(ISA) if name in known), "none")


def _digest(path: Path) -> str | None:
    import hashlib

    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError:
        return None


def _is_listed(folder: Path) -> bool:
    """Whether a folder is there, without asking for it by its name: over NFS the answer no would be remembered."""
    try:
        return folder in folder.parent.iterdir()
    except FileNotFoundError:
        return False
    except OSError:  # one that may be entered but not listed
        return folder.exists()


def _nearest(path: Path) -> Path:
    """The deepest part of a path that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _free_bytes(place: Path) -> int:
    stats = os.statvfs(place)
    return stats.f_bavail * stats.f_frsize
