"""Strict names of hosts and users, and "node[01-04,7]". Pure.

>>> list(expand("node[08-10,x]-ib"))
Traceback (most recent call last):
ValueError: not a number or a range of numbers: "x"
>>> list(expand("node[08-10]-ib"))
['node08-ib', 'node09-ib', 'node10-ib']
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

MOST_HOSTS: Final = 65_536
"""Names that one run may have."""
LONGEST_NAME: Final = 253

_NAME: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_USER: Final = re.compile(r"[A-Za-z_][A-Za-z0-9._-]*")
_INTERFACE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
_RANGES: Final = re.compile(r"\[([^\[\]]*)\]")
_DOTTED_NUMBERS: Final = re.compile(r"[0-9.]+")


def check_name(name: str) -> str:
    """The name of a host, or its IP address, as it was given.

    Raises:
        ValueError: ssh or a shell could take it for something else.
    """
    if ":" in name or _DOTTED_NUMBERS.fullmatch(name):
        return check_address(name)
    if len(name) > LONGEST_NAME or not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f'not a host name: "{name}"')
    return name


def check_user(name: str) -> str:
    """The name of a user, as it was given.

    Raises:
        ValueError: it is none.
    """
    if not _USER.fullmatch(name):
        raise ValueError(f'not a user name: "{name}"')
    return name


def check_interface(name: str) -> str:
    """The name of a network interface, as it was given.

    Raises:
        ValueError: it is none.
    """
    if not _INTERFACE.fullmatch(name):
        raise ValueError(f'not an interface name: "{name}"')
    return name


def check_address(text: str) -> str:
    """An IP address in its usual spelling.

    Raises:
        ValueError: it is none.
    """
    import ipaddress  # takes milliseconds, and most hostfiles have names

    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError(f'not an IP address: "{text}"') from None
    if getattr(address, "scope_id", None):
        raise ValueError(f'an address with a zone is known to one host only: "{text}"')
    return str(address)


def expand(text: str) -> Iterator[str]:
    """The names that ``text`` stands for, leading zeros kept.

    Raises:
        ValueError: a range is none, or there are too many names.
    """
    parts = _RANGES.split(text)  # plain, inside, plain, inside, ..., plain
    if any(sign in plain for plain in parts[::2] for sign in "[]"):
        raise ValueError(f'a bracket without its partner: "{text}"')
    choices = [_numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MOST_HOSTS:
        raise ValueError(f'{count} names, more than {MOST_HOSTS}: "{text}"')
    return _joined(choices)


def _joined(choices: list[list[str]]) -> Iterator[str]:
    if not choices:
        yield ""
        return
    for first in choices[0]:
        for rest in _joined(choices[1:]):
            yield first + rest


def _numbers(inside: str) -> list[str]:
    """ "01-03,7" -> 01 02 03 7."""
    found: list[str] = []
    for part in inside.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        ends = (first, last) if dash else (first, first)
        if not all(e.isascii() and e.isdigit() and len(e) <= 9 for e in ends):
            raise ValueError(f'not a number or a range of numbers: "{part}"')
        low, high = map(int, ends)
        if low > high:
            raise ValueError(f'a range that runs backwards: "{part}"')
        if len(found) + high - low >= MOST_HOSTS:
            raise ValueError(f'more than {MOST_HOSTS} names: "{part}"')
        found += [str(n).zfill(len(first)) for n in range(low, high + 1)]
    return found
