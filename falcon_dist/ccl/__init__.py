"""The torch.distributed backend "ccl": CPU collectives over oneCCL.

``import falcon_dist.ccl`` registers it; ``torch.distributed.init_process_group("ccl")`` then works in any
program. The compiled part is built (once, cached) and loaded when the first group is opened.
"""

from __future__ import annotations

import torch.distributed as _dist

from falcon_dist.ccl.backend import DEFAULT_TIMEOUT, create
from falcon_dist.ccl.build import ensure_built
from falcon_dist.ccl_recipe import recipe
from falcon_dist.contract import UserError

__all__ = ["DEFAULT_TIMEOUT", "ensure_built", "register", "unavailable"]


def unavailable() -> str | None:
    """Why the backend cannot be used here, in one line with the cure; None where it can.

    Compiles nothing: a missing build counts as available where a compiler is there to make it.
    """
    try:
        recipe()
    except UserError as error:
        return str(error)
    return None


def register() -> None:
    """Makes "ccl" known to torch.distributed; done on import, twice is once."""
    if not _dist.is_backend_available("ccl"):
        _dist.Backend.register_backend("ccl", create, extended_api=True, devices=["cpu"])


register()
