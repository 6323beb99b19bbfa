"""What a build of the ccl backend is made of and where it is kept, found without importing torch.

Standard library only; not a module of falcon_dist.ccl, which imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from falcon_dist.ccl_library import Library, find_library
from falcon_dist.contract import UserError

MODULE: Final = "_falcon_ccl"
PROBE: Final = "_falcon_ccl_probe"
BUILD: Final = Path(__file__).parent / "ccl" / "build.py"
SOURCES: Final = Path(__file__).parent / "ccl" / "src"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Torch:
    """The torch that a build is for."""

    version: str
    commit: str | None
    folder: Path
    """Its package, with ``include`` and ``lib``."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything a build depends on; ``key`` is its hash."""

    torch: Torch
    oneccl: Library
    compiler: str
    compiler_version: str
    flags: str
    """Those of the user, as CXXFLAGS has them."""
    cache: Path

    @property
    def key(self) -> str:
        """Hex digest that names the cache folder."""
        facts = {
            "torch": [self.torch.version, self.torch.commit],
            "python": sysconfig.get_config_var("SOABI"),
            "oneccl": [self.oneccl.version, str(self.oneccl.folder)],
            "compiler": self.compiler_version,
            "build": [BUILD.read_text(), self.flags],
            "sources": {p.name: p.read_text() for p in sorted(SOURCES.iterdir()) if p.is_file()},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def target(self) -> Path:
        """The finished module's path in the cache."""
        return self.cache / self.key / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"

    @property
    def probe(self) -> Path:
        """The finished probe's, beside the module; whoever finds the module finds it too."""
        return self.cache / self.key / PROBE


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """``$XDG_CACHE_HOME/falcon-dist/ccl``, by default under ``~/.cache``."""
    base = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "falcon-dist" / "ccl"


def recipe(environ: Mapping[str, str] = os.environ) -> Recipe:
    """What a build would be made of here. Raises UserError where torch, oneCCL or a compiler is missing."""
    oneccl = find_library(environ)
    compiler = environ.get("CXX") or "g++"
    path = shutil.which(compiler, path=environ.get("PATH"))
    if path is None:
        raise UserError(
            f"oneCCL: no C++ compiler {compiler!r} on PATH to build the ccl backend; install g++ 11 or later or set CXX"
        )
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return Recipe(
        torch=find_torch(),
        oneccl=oneccl,
        compiler=path,
        compiler_version=(version.stdout.splitlines() or ["unknown"])[0],
        flags=environ.get("CXXFLAGS", ""),
        cache=cache_folder(environ),
    )


def find_torch() -> Torch:
    """The torch that this Python would import. Raises UserError where there is none."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise UserError("oneCCL: torch is not installed, for which the ccl backend is built; install falcon-dist again")
    return read_torch(Path(found.origin).parent)


def read_torch(folder: Path) -> Torch:
    """What this package of torch says of itself. Raises UserError where it does not."""
    path = folder / "version.py"
    text = path.read_text(errors="replace") if path.is_file() else ""
    told = dict(re.findall(r"""^(__version__|git_version)\b[^=]*= *["']([^"']+)["']""", text, re.MULTILINE))
    if "__version__" not in told:
        raise UserError(f"oneCCL: {path} does not tell the version of torch; install torch again")
    return Torch(version=told["__version__"], commit=told.get("git_version"), folder=folder)
