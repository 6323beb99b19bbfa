"""Compiles the backend once per torch, oneCCL, compiler, flags and source, into the user's cache, and its probe.

A build goes to a temporary folder and is renamed when it is whole; an flock keeps two builders apart
and vanishes with its process, so a killed build leaves nothing that blocks the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import torch

from falcon_dist.ccl_recipe import SOURCES, Recipe, recipe
from falcon_dist.contract import UserError
from falcon_dist.durable import synchronise

log = logging.getLogger(__name__)

_FLAGS: Final = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    f'-DFALCON_TORCH_VERSION="{torch.__version__}"',
    f'-DFALCON_TORCH_GLOO="{str(torch.distributed.is_gloo_available()).lower()}"',
)
_ONLY_MODULE: Final = "module.cpp"
_ONLY_PROBE: Final = "probe.cpp"
_MOST_COMPILERS: Final = 4
"""At once: each takes up to 1 GB of memory."""
_BUILD_TIMEOUT_S: Final = 900


def ensure_built() -> Path:
    """The compiled module's path, compiling it first where the cache has none (about a minute).

    Raises UserError where oneCCL or a compiler is missing or the compiler fails, with its first error.
    """
    wanted = recipe()
    if wanted.target.is_file():
        return wanted.target
    with _locked(wanted):
        if not wanted.target.is_file():
            _compile_into(wanted)
    return wanted.target


@contextlib.contextmanager
def _locked(wanted: Recipe) -> Iterator[None]:
    wanted.cache.mkdir(parents=True, exist_ok=True)
    with (wanted.cache / f"{wanted.key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel when this process ends
        yield


def _compile_into(wanted: Recipe) -> None:
    started = time.monotonic()
    log.info("building the ccl backend for torch %s and oneCCL %s", wanted.torch.version, wanted.oneccl.version)
    with tempfile.TemporaryDirectory(dir=wanted.cache, prefix="build-") as name:
        objects = _compile_all(wanted, Path(name))
        shared = [path for source, path in objects.items() if source not in (_ONLY_MODULE, _ONLY_PROBE)]
        module, probe = Path(name, wanted.target.name), Path(name, wanted.probe.name)
        _run(_link(wanted, [objects[_ONLY_PROBE], *shared], ["-pie"], probe), wanted)
        _run(_link(wanted, [objects[_ONLY_MODULE], *shared], ["-shared", "-ltorch_python"], module), wanted)
        wanted.target.parent.mkdir(exist_ok=True)
        for made in (probe, module):
            synchronise(made)
        probe.rename(wanted.probe)
        module.rename(wanted.target)  # last: by it a build is known to be whole
    log.info("built the ccl backend in %.0f s: %s", time.monotonic() - started, wanted.target)


def _compile_all(wanted: Recipe, folder: Path) -> dict[str, Path]:
    """The object of every source, by its name; as many at once as there are cpus."""
    made = {source: folder / f"{source.stem}.o" for source in sorted(SOURCES.glob("*.cpp"))}
    words = _compile(wanted)
    with ThreadPoolExecutor(min(_MOST_COMPILERS, len(os.sched_getaffinity(0)))) as compilers:
        for _ in compilers.map(lambda s: _run([*words, "-c", str(s), "-o", str(made[s])], wanted), made):
            pass  # raises what one of them raised, and starts no more
    return {source.name: path for source, path in made.items()}


def _compile(wanted: Recipe) -> list[str]:
    torch_include = wanted.torch.folder / "include"
    folders = [
        torch_include,
        torch_include / "torch" / "csrc" / "api" / "include",
        wanted.oneccl.include,
        Path(sysconfig.get_paths()["include"]),
    ]
    includes = [flag for folder in folders for flag in ("-isystem", str(folder))]
    return [wanted.compiler, *_FLAGS, *_abi_flags(), *includes, *wanted.flags.split()]


def _abi_flags() -> list[str]:
    """What torch was built with where pybind11 asks for it (torch before 2.9): types are shared by these."""
    flags = []
    for name in ("COMPILER_TYPE", "STDLIB", "BUILD_ABI"):
        value = getattr(torch._C, f"_PYBIND11_{name}", None)
        if value is not None:
            flags.append(f'-DPYBIND11_{name}="{value}"')
    return flags


def _link(wanted: Recipe, objects: list[Path], kind: list[str], made: Path) -> list[str]:
    library = wanted.oneccl.folder
    return [
        wanted.compiler,
        *map(str, objects),
        "-o",
        str(made),
        f"-L{wanted.torch.folder / 'lib'}",
        *kind,
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
