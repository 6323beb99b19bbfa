"""Compiles the backend once per torch, oneCCL, compiler, flags and source, into the user's cache.

A build goes to a temporary folder and is renamed when it is whole; an flock keeps two builders apart
and vanishes with its process, so a killed build leaves nothing that blocks the next one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from falcon_dist.ccl.oneccl import Library, find_library
from falcon_dist.contract import UserError

log = logging.getLogger(__name__)

MODULE: Final = "_falcon_ccl"
SOURCES: Final = Path(__file__).parent / "src"
_FLAGS: Final = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
)
_BUILD_TIMEOUT_S: Final = 900


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything a build depends on; ``key`` is its hash."""

    oneccl: Library
    compiler: str
    compiler_version: str

    @property
    def key(self) -> str:
        """Hex digest that names the cache folder."""
        facts = {
            "torch": [torch.__version__, torch.version.git_version],
            "python": sysconfig.get_config_var("SOABI"),
            "oneccl": [self.oneccl.version, str(self.oneccl.folder)],
            "compiler": self.compiler_version,
            "build": [Path(__file__).read_text(), os.environ.get("CXXFLAGS", "")],
            "sources": {p.name: p.read_text() for p in sorted(SOURCES.iterdir()) if p.is_file()},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def target(self) -> Path:
        """The finished module's path in the cache."""
        return cache_folder() / self.key / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/falcon-dist/ccl``, by default under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "falcon-dist" / "ccl"


def recipe() -> Recipe:
    """What a build would be made of here. Raises UserError where oneCCL or a compiler is missing."""
    oneccl = find_library()
    compiler = os.environ.get("CXX") or "g++"
    path = shutil.which(compiler)
    if path is None:
        raise UserError(
            f"oneCCL: no C++ compiler {compiler!r} on PATH to build the ccl backend; install g++ 11 or later or set CXX"
        )
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return Recipe(oneccl=oneccl, compiler=path, compiler_version=version.stdout.splitlines()[0])


def ensure_built() -> Path:
    """The compiled module's path, compiling it first where the cache has none (about a minute).

    Raises UserError where oneCCL or a compiler is missing or the compiler fails, with its first error.
    """
    wanted = recipe()
    if wanted.target.is_file():
        return wanted.target
    with _locked(wanted.key):
        if not wanted.target.is_file():
            _compile_into(wanted)
    return wanted.target


@contextlib.contextmanager
def _locked(key: str) -> Iterator[None]:
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel when this process ends
        yield


def _compile_into(wanted: Recipe) -> None:
    started = time.monotonic()
    log.info("building the ccl backend for torch %s and oneCCL %s", torch.__version__, wanted.oneccl.version)
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="build-") as name:
        folder = Path(name)
        objects = []
        for source in sorted(SOURCES.glob("*.cpp")):
            objects.append(folder / f"{source.stem}.o")
            _run([*_compile(wanted), "-c", str(source), "-o", str(objects[-1])], wanted)
        module = folder / wanted.target.name
        _run(_link(wanted, [*map(str, objects), "-o", str(module)]), wanted)
        for path in objects:
            path.unlink()
        wanted.target.parent.mkdir(exist_ok=True)
        module.rename(wanted.target)
    log.info("built the ccl backend in %.0f s: %s", time.monotonic() - started, wanted.target)


def _compile(wanted: Recipe) -> list[str]:
    torch_include = Path(torch.__file__).parent / "include"
    folders = [
        torch_include,
        torch_include / "torch" / "csrc" / "api" / "include",
        wanted.oneccl.include,
        Path(sysconfig.get_paths()["include"]),
    ]
    extra = os.environ.get("CXXFLAGS", "").split()
    includes = [flag for folder in folders for flag in ("-isystem", str(folder))]
    return [wanted.compiler, *_FLAGS, *_abi_flags(), *includes, *extra]


def _abi_flags() -> list[str]:
    """What torch was built with where pybind11 asks for it (torch before 2.9): types are shared by these."""
    flags = []
    for name in ("COMPILER_TYPE", "STDLIB", "BUILD_ABI"):
        value = getattr(torch._C, f"_PYBIND11_{name}", None)
        if value is not None:
            flags.append(f'-DPYBIND11_{name}="{value}"')
    return flags


def _link(wanted: Recipe, objects: list[str]) -> list[str]:
    torch_lib = Path(torch.__file__).parent / "lib"
    library = wanted.oneccl.folder
    return [
        wanted.compiler,
        "-shared",
        *objects,
        f"-L{torch_lib}",
        "-ltorch_python",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        f"-L{library}",
        "-lccl",
        f"-Wl,-rpath,{library}",
        "-ldl",
        "-pthread",
    ]


def _run(argv: list[str], wanted: Recipe) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_BUILD_TIMEOUT_S)
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        log.error("%s", done.stderr)
        raise UserError(
            f"oneCCL: {wanted.compiler} cannot build the ccl backend: {first}; "
            f"install a C++20 compiler (found: {wanted.compiler_version}) or set CXX"
        )
