"""A run's folder as an agent sees it: shared with the launcher or this host's own."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from launcher.plan import NodePlan

MOST_KEPT_BYTES: Final = 1 << 20
"""Larger files of a rank stay on its host."""
PLAN_FILE: Final = "plan.json"
"""Written by the launcher alone, into the folder of the attempt."""
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
        # A name of its own: hosts that share a disk among themselves, but not with the launcher, all write it now.
        partial = path.with_name(f"{path.name}.partial-{plan.node_rank}")
        partial.write_text(text)
        partial.chmod(0o600)
        partial.rename(path)
    return not missing


def is_the_launchers(plan: NodePlan) -> bool:
    """Whether the launcher's own files are here too; those sent along may be of a host that shares this disk."""
    return Path(plan.roster).with_name(PLAN_FILE).exists()


def kept(folder: Path) -> dict[str, str]:
    """The small text files a rank has left in its folder, for a launcher that cannot see it; others stay there.

    None where the folder is gone or cannot be read.
    """
    try:
        found = [p for p in folder.iterdir() if p.is_file() and p.name not in NOT_KEPT]
        small = [p for p in found if p.stat().st_size <= MOST_KEPT_BYTES]
        texts = {path.name: _text_of(path) for path in small}
    except OSError:
        return {}
    return {name: text for name, text in texts.items() if text is not None}


def _text_of(path: Path) -> str | None:
    """What a file says; None: it is no text, as a compressed trace is none."""
    data = path.read_bytes()
    return None if b"\0" in data else data.decode(errors="replace")


def _has(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False
