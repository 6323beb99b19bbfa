"""What a person sees of a run: text on standard output, faults on standard error, one line that is written over."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from typing import Any, Final

from launcher import render

ERASE: Final = "\r\x1b[K"


class Console:
    """Shows what happens. ``quiet``: faults and the end only."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._is_terminal = sys.stdout.isatty()
        self._progress = ""

    def say(self, text: str) -> None:
        """A line of progress."""
        if not self._quiet:
            self.conclude(text)

    def conclude(self, text: str) -> None:
        """Text that is shown in any case."""
        self._write(f"{text}\n")

    def complain(self, text: str) -> None:
        """A fault."""
        self._erase()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def step(self, event: Mapping[str, Any]) -> None:
        """A finished step of rank 0."""
        if event.get("log"):
            self.say(render.step_line(event))
        if self._is_terminal and not self._quiet:
            # Cut to the terminal's width: a line that wraps cannot be written over.
            self._progress = render.progress_line(event)[: shutil.get_terminal_size().columns - 1]
            self._write("")

    def end_progress(self) -> None:
        """The line that is written over is not needed any more."""
        self._erase()
        self._progress = ""

    def _erase(self) -> None:
        if self._progress:
            sys.stdout.write(ERASE)
            sys.stdout.flush()

    def _write(self, text: str) -> None:
        self._erase()
        sys.stdout.write(text + self._progress)
        sys.stdout.flush()
