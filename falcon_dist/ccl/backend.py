"""Opens groups of the ``ccl`` backend: environment, build, load, and the way out."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from torch._C._distributed_c10d import Backend, PrefixStore, ProcessGroupGloo, Store, _DistributedBackendOptions
from torch.distributed.constants import default_pg_timeout

from falcon_dist.ccl.build import ensure_built
from falcon_dist.ccl.hosts import Place, find_place
from falcon_dist.ccl_environment import INTERFACE, environment, lacking
from falcon_dist.ccl_library import find_library
from falcon_dist.ccl_recipe import MODULE

log = logging.getLogger(__name__)

DEFAULT_TIMEOUT: Final = timedelta(seconds=120)
"""Longest wait for other ranks where the program gave none. torch hands its own default of 30 minutes to
every backend, so a program that wants exactly that has to ask for a second more or less."""
_EXIT_PATIENCE_S: Final = 5.0


def create(options: _DistributedBackendOptions, backend_options: Any = None) -> Backend:  # noqa: ARG001
    """Creates this rank's member of a ``ccl`` group; torch calls it, as a collective of all members.

    Raises UserError where oneCCL or a compiler is missing and torch.distributed.DistBackendError where a
    member does not come within the timeout.
    """
    timeout = DEFAULT_TIMEOUT if options.timeout == default_pg_timeout else options.timeout
    ranks = list(options.global_ranks_in_group) or list(range(options.group_size))
    store = _unused(options.store, options.group_size)
    module = load(lambda: find_place(store, options.group_rank, options.group_size, timeout))
    created: Backend = module.create(
        store=store,
        rank=options.group_rank,
        size=options.group_size,
        timeout_s=timeout.total_seconds(),
        group=options.group_id or "default",
        global_ranks=ranks,
        make_inner=lambda: _inner(store, options.group_rank, options.group_size, timeout),
    )
    return created


def _unused(store: Store, size: int) -> Store:
    """A part of the store into which no group that was opened under the same name before has written."""
    opened = store.add("opened", 1)
    return PrefixStore(f"opening-{(opened - 1) // size}", store)


def load(place: Callable[[], Place]) -> ModuleType:
    """The compiled module, loaded on the first call; ``place`` is asked only then."""
    loaded = sys.modules.get(MODULE)
    if loaded is not None:
        return loaded
    path = ensure_built()
    _set_environment(place())
    module = _import(path)
    # torch's own atexit handlers and the interpreter's teardown come after this one.
    atexit.register(module.close_all, _EXIT_PATIENCE_S)
    return module


def _set_environment(place: Place) -> None:
    """Adds what is missing of CCL_* and FI_* to this process's environment, once, before libccl reads it."""
    wanted = environment(
        local_rank=place.local_rank,
        local_size=place.local_size,
        interface=place.interface,
        library_folder=str(find_library().folder),
    )
    missing = lacking(os.environ, wanted)
    os.environ.update(missing)
    if missing:
        log.info("ccl: set %s", " ".join(f"{name}={value}" for name, value in missing.items()))


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"ccl: {path} is no Python module; delete it to have it built again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[MODULE] = module
    return module


def _inner(store: Store, rank: int, size: int, timeout: timedelta) -> Backend:
    """The gloo group that carries send, recv and bitwise reductions, made at the first of them.

    It connects pairs lazily, so only the ranks that talk need to come.
    """
    gloo: Any = ProcessGroupGloo  # its options are in no type stub
    settings = gloo._Options()
    settings._timeout = timeout
    settings._devices = [gloo.create_device(interface=os.environ[INTERFACE], lazy_init=True)]
    inner: Backend = gloo(PrefixStore("gloo", store), rank, size, settings)
    return inner
