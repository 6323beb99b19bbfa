"""A run's folder as an agent sees it: shared with the launcher or this host's own."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from launcher.plan import NodePlan

MOST_KEPT_BYTES: Final = 1 << 20
"""Larger files of a rank stay on its host."""
NOT_KEPT: Final = ("stdout", "stderr")
"""These went to the launcher while they grew."""


def settle(plan: NodePlan) -> bool:
    """Makes sure that the files sent along exist here; returns whether they did, as in a shared folder.

    Raises:
        OSError: they cannot be written.
    """
    for folder in {Path(name).parent for name in plan.files}:
        # First: over NFS a host can remember that a folder was not there; making it asks the server again.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    missing = [(Path(name), text) for name, text in plan.files.items() if not _has(Path(name), text)]
    for path, text in missing:
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text)
        partial.chmod(0o600)
        partial.rename(path)
    return not missing


def kept(folder: Path) -> dict[str, str]:
    """The small text files a rank has left in its folder, for a launcher that cannot see it."""
    found = [p for p in folder.iterdir() if p.is_file() and p.name not in NOT_KEPT]
    small = [p for p in found if p.stat().st_size <= MOST_KEPT_BYTES]
    return {path.name: path.read_text(errors="replace") for path in small}


def _has(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False
