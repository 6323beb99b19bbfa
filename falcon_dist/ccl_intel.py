"""Intel's own binding, ``oneccl_bindings_for_pytorch``, in place of ours where somebody has it installed.

Both give torch.distributed a backend named "ccl", so a process takes one or the other. Intel's is built for one
torch version and crashes on others; it is judged by its metadata, before it is imported.
Ours takes the name on import of falcon_dist.ccl, so this is not a module of that package.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Final

from falcon_dist.contract import UserError

DISTRIBUTION: Final = "oneccl-bind-pt"
MODULE: Final = "oneccl_bindings_for_pytorch"
_CURE: Final = "use --backend ccl, which is built for the torch that is installed"


def fault(versions: Mapping[str, str]) -> str | None:
    """Why Intel's binding cannot be used with these distributions (name to version), or None where it can.

    Its version is that of the torch it was built for, up to a patch release and a build tag: "2.8.0+cpu".
    """
    binding, torch = versions.get(DISTRIBUTION), versions.get("torch")
    if binding is None:
        return f'--backend: {MODULE} is not installed: "ccl-intel"; {_CURE}'
    if torch is None or _release(binding) is None or _release(binding) != _release(torch):
        return f'--backend: {MODULE} {binding} is not for torch {torch}: "ccl-intel"; {_CURE}'
    return None


def register() -> None:
    """Makes Intel's binding the backend "ccl" of this process. Raises UserError where it does not fit torch."""
    reason = fault(_installed())
    if reason is not None:
        raise UserError(reason)
    importlib.import_module(MODULE)


def _release(version: str) -> str | None:
    """ "2.8" of "2.8.0+cpu"."""
    found = re.match(r"\d+\.\d+(?=[.+]|$)", version)
    return found[0] if found else None


def _installed() -> dict[str, str]:
    from importlib import metadata  # here, for the launcher that plans a run without it is quicker by a tenth

    versions = {}
    for name in (DISTRIBUTION, "torch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
