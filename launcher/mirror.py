"""Keeps what ranks of hosts with a folder of their own write, in the launcher's run folder too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from launcher.plan import NodePlan
from launcher.record import Record


class Mirror:
    """Copies from those hosts alone: in a shared folder a copy would be read as what the rank wrote, without end."""

    def __init__(self, record: Record, note: Callable[[str], None] | None = None) -> None:
        self._record = record
        self._note = note or record.note
        self._told: set[str] = set()

    def told_apart(self, node: NodePlan) -> None:
        """An agent did not find what it was sent; believed unless its signature is in the launcher's own folder."""
        if not Path(node.roster).exists():
            self._record.apart.add(node.node_rank)

    def append(self, node_rank: int, rank: int, stream: str, lines: Iterable[str]) -> None:
        """Lines a rank wrote to its stdout or stderr."""
        if node_rank in self._record.apart:
            with self._trying(), (self._folder(rank) / stream).open("a", errors="backslashreplace") as file:
                file.writelines(f"{line}\n" for line in lines)

    def keep(self, node_rank: int, rank: int, files: Mapping[str, str]) -> None:
        """Files a rank left behind."""
        if node_rank in self._record.apart:
            for name, text in files.items():
                with self._trying():
                    (self._folder(rank) / Path(name).name).write_text(text, errors="backslashreplace")

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        """A copy that cannot be made is no reason to end ranks: what they wrote is on their hosts."""
        try:
            yield
        except OSError as fault:
            text = f"output of ranks on other hosts is not copied into the run folder: {fault.strerror}"
            if text not in self._told:
                self._told.add(text)
                self._note(text)

    def _folder(self, rank: int) -> Path:
        folder = Path(self._record.plan_of(rank).rank_dir)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
