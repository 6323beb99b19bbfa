"""What a run is made of besides its settings, as digests that a checkpoint keeps and a resumed run compares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from transformers.utils import cached_file

import falcon_dist
from falcon_dist.config import ModelConfig
from falcon_dist.engine.native import base_of

TOKENIZER_FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
SETTINGS: Final = ("global_batch", "seed", "total_steps", "precision", "strategy")
"""Where these differ, other rows or another state would be trained."""
MADE_OF: Final = ("rows", "tokenizer", "model_config")
"""Digests that must be the same."""
TOLD_ONLY: Final = ("code",)
"""A run may go on with a newer version of this project; that is said."""
NAMES: Final = {"rows": "data (packed rows)", "model_config": "model config", "code": "falcon-dist code"}
SHOWN: Final = 12
"""Digits of a digest that a person is shown."""
Difference = tuple[str, str, str]
"""What, then, now."""


def identity_of(model: str, config: ModelConfig) -> dict[str, str]:
    """Hex sha256 of the tokenizer, the model's configuration and this package's code.

    Args:
        model: folder or hub name; of adapters, the configuration is that of the model they were trained on.
        config: which revision of it.
    """
    return {
        "tokenizer": _digest(model, config, TOKENIZER_FILES),
        "model_config": _digest(base_of(model), config, ("config.json",)),
        "code": code_digest(Path(next(iter(falcon_dist.__path__)))),
    }


def _digest(model: str, config: ModelConfig, names: Sequence[str]) -> str:
    revision = "main" if Path(model).exists() else config.revision or "main"
    whole = hashlib.sha256()
    for name in names:
        found = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found:
            whole.update(f"{name}\0".encode() + _content(Path(found)))
    return whole.hexdigest()


def _content(path: Path) -> bytes:
    """A file's bytes; of JSON what it says, without the version of the library that wrote it."""
    if path.suffix != ".json":
        return path.read_bytes()
    values = json.loads(path.read_bytes())
    if isinstance(values, dict):
        values.pop("transformers_version", None)
    return json.dumps(values, sort_keys=True).encode()


def code_digest(package: Path) -> str:
    """Hex sha256 of every Python file below a folder, and its name."""
    whole = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        whole.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()


def differences(then: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]) -> list[Difference]:
    """What is not as it was, of the facts that the checkpoint tells. Pure."""
    return [(NAMES.get(k, k), _short(then[k]), _short(now[k])) for k in keys if k in then and then[k] != now[k]]


def unknown(then: Mapping[str, Any]) -> list[str]:
    """What a checkpoint does not tell of, because it was saved before this was kept. Pure."""
    return [NAMES.get(key, key) for key in (*MADE_OF, *TOLD_ONLY) if key not in then]


def table(rows: Sequence[Difference]) -> list[str]:
    """The differences as lines in columns. Pure."""
    whole = [("", "then", "now"), *rows]
    widths = [max(len(row[column]) for row in whole) for column in range(3)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in whole]


def _short(value: Any) -> str:
    text = str(value)
    return text[:SHOWN] if len(text) == hashlib.sha256().digest_size * 2 else text
