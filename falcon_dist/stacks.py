"""Stacks of all threads on demand: the launcher asks for them before it ends a run that no longer moves.

Standard library only.
"""

from __future__ import annotations

import faulthandler
from pathlib import Path

from falcon_dist.contract import STACKS_FILE, STACKS_SIGNAL


def write_when_asked(rank_dir: Path) -> None:
    """Writes every thread's Python stack to ``stacks.txt`` of this folder whenever STACKS_SIGNAL comes.

    faulthandler does so in the signal handler itself: also where the interpreter is held by some other code.
    """
    file = (rank_dir / STACKS_FILE).open("w")  # faulthandler keeps it open
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)
