"""What a person sees of a run: text on standard output, faults on standard error, one line that is written over."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final

from launcher import render
from launcher.outlet import Outlet

ERASE: Final = "\r\x1b[K"


class Console:
    """Shows what happens, for as long as anybody looks. ``quiet``: faults and the end only."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._is_terminal = sys.stdout.isatty()
        self._progress = ""
        self._outlet = Outlet()

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, where: TracebackType | None
    ) -> None:
        self._outlet.close()

    def say(self, text: str, *, always: bool = False) -> None:
        """Lines of progress; ``always``: not left out where others are that nobody reads."""
        if not self._quiet:
            self._write(f"{text}\n", always=always)

    def conclude(self, text: str) -> None:
        """Text that is shown in any case."""
        self._write(f"{text}\n", always=True)

    def complain(self, text: str) -> None:
        """A fault."""
        self._erase()
        self._outlet.put(sys.stderr.fileno(), f"{text}\n")

    def main_told(self, told: Mapping[str, Any]) -> None:
        """Rank 0 has told something of the whole run."""
        match told:
            case {"event": "line", "text": text}:
                self.say(str(text))
            case {"event": "step", "step": int()}:
                self.step(told)

    def step(self, event: Mapping[str, Any]) -> None:
        """A finished step of rank 0."""
        try:
            line, progress = render.step_line(event), render.progress_line(event)
        except (TypeError, ValueError, OverflowError):  # of another's program: null for a loss, or no end in sight
            return
        if event.get("log"):
            self.say(line)
        if self._is_terminal and not self._quiet:
            # Cut to the terminal's width: a line that wraps cannot be written over.
            self._progress = progress[: shutil.get_terminal_size().columns - 1]
            self._write("")

    def end_progress(self) -> None:
        """The line that is written over is not needed any more."""
        self._erase()
        self._progress = ""

    def _erase(self) -> None:
        if self._progress:
            self._outlet.put(sys.stdout.fileno(), ERASE)

    def _write(self, text: str, *, always: bool = False) -> None:
        erase = ERASE if self._progress else ""
        self._outlet.put(sys.stdout.fileno(), erase + text + self._progress, always=always)
