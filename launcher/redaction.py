"""Which values are secrets, and what of them may be shown or kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

REDACTED: Final = "<redacted>"
_SECRET: Final = re.compile(
    r"TOKEN(?!IZERS)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(API|ACCESS|PRIVATE)KEY|CONNECTION_STRING"
    r"|(^|_)(KEY|AUTH|PAT|PASS|PGPASS|JWT)(_|$)|(?<=.)(?<!OLD)PWD$",
    re.IGNORECASE,
)
_URL_LOGIN: Final = re.compile(r"(?<=://)[^/\s]*@")


def is_secret(name: str) -> bool:
    """Whether a variable of this name may hold a secret."""
    return _SECRET.search(name) is not None


def redact_value(name: str, value: str) -> str:
    """The value, or what may be shown of it: logins inside addresses go too."""
    return REDACTED if is_secret(name) else _URL_LOGIN.sub(f"{REDACTED}@", value)


def redact(env: Mapping[str, str]) -> dict[str, str]:
    """The same names with secrets struck out."""
    return {name: redact_value(name, value) for name, value in env.items()}
