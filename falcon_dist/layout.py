"""Which tensor of a checkpoint goes into which file, and which rank writes it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from falcon_dist.contract import UserError

_UNITS: Final = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file and what is in it."""

    name: str
    """Relative to the checkpoint's folder."""
    writer: int
    """Index of the rank among those that write."""
    tensors: tuple[str, ...]


def parse_size(text: str, name: str = "checkpoint.max_shard_size") -> int:
    """ "200MB" -> 200,000,000, as transformers reads it; ``name``: what gave it.

    Raises:
        UserError: no such size.
    """
    told = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)", text.strip().upper())
    if told is None or not float(told[1]):
        raise UserError(f'{name} must be a size as in "200MB" or "2GB": "{text}"')
    return int(float(told[1]) * _UNITS[told[2]])


def shards(sizes: Mapping[str, int], name: str, *, writers: int, max_bytes: int) -> tuple[Shard, ...]:
    """Files of about equal share for every writer, none above ``max_bytes`` but for a tensor that is larger.

    Args:
        sizes: bytes of each tensor, in the order in which they are written.
        name: ``model`` gives ``model.safetensors``, or ``model-00001-of-00003.safetensors`` and so on.
        writers: how many ranks write.
        max_bytes: largest file.
    """
    parts = [
        (writer, part) for writer, share in enumerate(_shares(sizes, writers)) for part in _cut(share, sizes, max_bytes)
    ]
    return tuple(
        Shard(name=_file_name(name, number, len(parts)), writer=writer, tensors=part)
        for number, (writer, part) in enumerate(parts, start=1)
    )


def _file_name(name: str, number: int, count: int) -> str:
    return f"{name}.safetensors" if count == 1 else f"{name}-{number:05d}-of-{count:05d}.safetensors"


def _shares(sizes: Mapping[str, int], writers: int) -> list[list[str]]:
    """The names in order, cut where equal shares of the bytes end: a tensor belongs where its middle lies."""
    total = max(1, sum(sizes.values()))
    found: list[list[str]] = [[] for _ in range(writers)]
    for (name, size), end in zip(sizes.items(), accumulate(sizes.values()), strict=True):
        found[min(writers - 1, (2 * end - size) * writers // (2 * total))].append(name)
    return found


def _cut(names: Sequence[str], sizes: Mapping[str, int], max_bytes: int) -> list[tuple[str, ...]]:
    parts: list[list[str]] = []
    room = 0
    for name in names:
        if not parts or sizes[name] > room:
            parts.append([])
            room = max_bytes
        parts[-1].append(name)
        room -= sizes[name]
    return [tuple(part) for part in parts]
