"""Variables for ranks from a file (--env-file)."""

from __future__ import annotations

import re
from pathlib import Path

from launcher.errors import UserError


def lines(name: str | None) -> list[str]:
    """The ``NAME=VALUE`` lines of a file without "export " in front and quotes around values; none where none is named.

    Raises:
        UserError: it cannot be read, or has a line of another form.
    """
    if name is None:
        return []
    try:
        written = Path(name).read_text(encoding="utf-8").split("\n")  # a value may hold other kinds of line ends
    except OSError as fault:
        raise UserError(f'--env-file: cannot be read: "{name}"; {fault.strerror}') from fault
    except UnicodeDecodeError as fault:
        raise UserError(f'--env-file: not UTF-8 text: "{name}"; give NAME=VALUE lines') from fault
    rows = [(number, line.strip()) for number, line in enumerate(written, 1)]
    return [_line(name, number, line) for number, line in rows if line and not line.startswith("#")]


def _line(name: str, number: int, line: str) -> str:
    key, equals, value = line.removeprefix("export ").partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*", key.strip()):
        raise UserError(f'{name}:{number}: not of the form NAME=VALUE: "{key.strip()}"')
    value = value.strip()
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return f"{key.strip()}={value[1:-1] if quoted else value}"
