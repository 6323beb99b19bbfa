"""Keeps what ranks of hosts with a folder of their own write, in the launcher's run folder too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path


def append(folder: str, stream: str, lines: Iterable[str]) -> None:
    """Lines a process wrote to its stdout or stderr."""
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    with (Path(folder) / stream).open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def keep(folder: str, files: Mapping[str, str]) -> None:
    """Files a rank left behind."""
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in files.items():
        (Path(folder) / Path(name).name).write_text(text)
