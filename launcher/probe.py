"""The compiled probe on a host: it tells what falcon_dist.host_facts tells, at a fifth of the cost.

It is built with the ccl backend. That torch can be imported it does not prove: of hosts with the same packages one
does that for all.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from falcon_dist import ccl_environment, ccl_recipe
from launcher.errors import UserError

NONE: Final[Mapping[str, Any]] = {"probe": {}, "packages": ""}
"""What a host tells that has none."""
NOT_IMPORTED: Final = ("include", "__pycache__")


def find(cache: Mapping[str, str]) -> Mapping[str, Any]:
    """The probe that was built for this host's software, empty where there is none; and what its packages are like.

    ``cache``: the variables by which a run would look for the backend.
    """
    try:
        made = ccl_recipe.recipe(os.environ | cache)
        # A cache on a file system that runs no programs has a probe of no use.
        if not (made.target.is_file() and os.access(made.probe, os.X_OK)):
            return NONE
        places = {"path": str(made.probe), "torch": str(made.torch.folder / "lib"), "oneccl": str(made.oneccl.folder)}
        return {"probe": places, "packages": _packages(made.torch.folder)}
    except (UserError, OSError):  # Python will tell what is wrong there
        return NONE


def environment(probe: Mapping[str, str], seat: Mapping[str, str]) -> dict[str, str]:
    """What the probe needs besides this process's environment and ``seat``: its libraries, and settings of oneCCL."""
    libraries = (probe["torch"], probe["oneccl"], os.environ.get("LD_LIBRARY_PATH", ""))
    env = {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries))}
    if not seat:
        return env
    ifname = seat[ccl_environment.INTERFACE]
    wanted = ccl_environment.environment(local_rank=0, local_size=1, interface=ifname, library_folder=probe["oneccl"])
    return env | ccl_environment.lacking(os.environ | seat, wanted)


def _packages(torch: Path) -> str:
    """Stands for all that an import of torch depends on: this Python, what is installed, and the size of its files."""
    installed = {path.name for place in sys.path if place for path in Path(place).glob("*.dist-info")}
    sizes = sorted(f"{os.path.relpath(entry.path, torch)} {entry.stat().st_size}" for entry in _files(str(torch)))
    return hashlib.sha256("\n".join([sys.version, *sorted(installed), *sizes]).encode()).hexdigest()[:12]


def _files(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry
            elif entry.name not in NOT_IMPORTED:
                yield from _files(entry.path)
