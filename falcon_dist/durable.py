"""What is to be whole after the host went down, before it gets its name."""

from __future__ import annotations

import os
from pathlib import Path


def synchronise(path: Path) -> None:
    """Returns when the disk has the file, or the folder's own entries.

    Raises:
        OSError: it does not take them.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
