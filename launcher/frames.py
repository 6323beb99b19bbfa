"""Lines of many agents over the one input and output that srun has for all its tasks. Pure.

Down, srun gives every task the same input: "node3 {...}" is for node3, "node3" alone ends its input. Up, srun mixes
the tasks' lines and cuts long ones, so an agent's line travels in pieces: "node3 +abc" and "node3 =def" are "abcdef";
"node3 !0" is the exit code of its agent, "node3 ~" a word that it is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

LONGEST_PIECE: Final = 640
"""srun passes lines on whole where they are shorter than 1024 bytes, and a node's name takes at most 253."""


def down(host: str, line: bytes) -> bytes:
    """A line for one task."""
    return b"%s %s\n" % (host.encode(), line)


def down_end(host: str) -> bytes:
    """The end of one task's input."""
    return b"%s\n" % host.encode()


def taken(host: str, frame: bytes) -> bytes | None:
    """What a task is told by a line of the common input: a line, empty for the end; None: it is for another one."""
    to, _, line = frame.partition(b" ")
    return line if to == host.encode() else None


def up(host: str, line: bytes) -> Iterator[bytes]:
    """A line of a task, in pieces."""
    name = host.encode()
    while len(line) > LONGEST_PIECE:
        yield b"%s +%s\n" % (name, line[:LONGEST_PIECE])
        line = line[LONGEST_PIECE:]
    yield b"%s =%s\n" % (name, line)


def up_held(host: str) -> bytes:
    """A word that a task's agent is held by a disk."""
    return b"%s ~\n" % host.encode()


def up_end(host: str, code: int) -> bytes:
    """The last line of a task."""
    return b"%s !%d\n" % (host.encode(), code)


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    """A whole line of a task, that it is held, or its end."""

    host: str
    line: bytes = b""
    held: bool = False
    code: int | None = None
    """Set: its agent has ended so."""


@dataclass(slots=True)
class Joiner:
    """Puts the pieces of all tasks together again."""

    hosts: frozenset[str]
    _parts: dict[str, list[bytes]] = field(default_factory=dict)

    def take(self, frame: bytes) -> Said | None:
        """What this piece completes; None: nothing yet.

        Raises:
            ValueError: it is no piece, but somebody else's line.
        """
        name, _, piece = frame.partition(b" ")
        host, kind, text = name.decode(errors="replace"), piece[:1], piece[1:]
        if host not in self.hosts or kind not in (b"+", b"=", b"!", b"~"):
            raise ValueError(frame[:200].decode(errors="replace"))
        if kind == b"!":
            return Said(host=host, code=int(text))
        if kind == b"~":
            return Said(host=host, held=True)
        self._parts.setdefault(host, []).append(text)
        # Joined once: a line can be of thousands of pieces.
        return Said(host=host, line=b"".join(self._parts.pop(host))) if kind == b"=" else None
