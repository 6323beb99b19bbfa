"""What the bytes of a checkpoint are known by.

BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs): as hard to forge as sha256, at two to three times its rate on one
core (docs/checkpoints.md), and `b3sum` tells it too. Checkpoints of before are known by sha256, and verified by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

KIND: Final = "blake3"
"""What new files are hashed by."""
KINDS: Final[Mapping[str, Callable[[], Any]]] = {KIND: blake3, "sha256": hashlib.sha256}
_AT_ONCE: Final = 1 << 20


def hasher(kind: str = KIND) -> Any:
    """An object with hashlib's ``update`` and ``hexdigest``; it lets go of the interpreter while it works.

    Raises:
        ValueError: no such hash is known.
    """
    if kind not in KINDS:
        raise ValueError(f'no such hash: "{kind}"')
    return KINDS[kind]()


def of_file(path: Path, kind: str = KIND) -> str:
    """Hex hash of a file's bytes."""
    found = hasher(kind)
    with path.open("rb", buffering=0) as file:
        while data := file.read(_AT_ONCE):
            found.update(data)
    return str(found.hexdigest())
