"""Where oneCCL is on this machine: headers, libccl and libfabric's providers.

Standard library only; not a module of falcon_dist.ccl, which imports torch.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from falcon_dist.contract import UserError

CURE: Final = "pip install 'falcon-dist[oneccl]'"
_VERSION = re.compile(r'#define CCL_PRODUCT_FULL\s+"([^"]+)"')


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Library:
    """One installed oneCCL."""

    include: Path
    """Folder that holds oneapi/ccl.hpp."""
    folder: Path
    """Folder that holds libccl.so.1 and libfabric's providers."""
    version: str
    """As the headers give it, for example "Gold-2021.15.2 2025-05-12T 08:06:45Z (HEAD/ae8376ff)"."""


def find_library(environ: Mapping[str, str] = os.environ) -> Library:
    """The oneCCL of ``CCL_ROOT`` where that is set, else the one pip installed into this environment.

    Raises UserError with the cure where headers or library are missing.
    """
    given = environ.get("CCL_ROOT")
    roots = [Path(given)] if given else _pip_roots()
    for root in roots:
        header = root / "include" / "oneapi" / "ccl" / "config.h"
        if header.is_file() and (root / "lib" / "libccl.so.1").is_file():
            found = _VERSION.search(header.read_text())
            return Library(include=root / "include", folder=root / "lib", version=found[1] if found else "unknown")
    place = f"CCL_ROOT={given}" if given else f"the Python environment {sys.prefix}"
    raise UserError(f"oneCCL: no include/oneapi/ccl.hpp with lib/libccl.so.1 in {place}; {CURE}")


def _pip_roots() -> list[Path]:
    """Folders into which the wheel's "data" may have gone, best first."""
    roots = [Path(sys.prefix)]
    try:
        files = importlib.metadata.files("oneccl-cpu-devel") or []
    except importlib.metadata.PackageNotFoundError:
        return roots
    for file in files:
        if file.name == "ccl.hpp":
            roots.insert(0, Path(str(file.locate())).resolve().parents[2])
    return roots
