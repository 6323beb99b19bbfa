"""What a run is made of besides its settings, as digests that a checkpoint keeps and a resumed run compares."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from transformers.utils import cached_file

import falcon_dist
from falcon_dist import checkpoint
from falcon_dist.config import ModelConfig, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.engine.native import base_of

TOKENIZER_FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model"),
)
CODE: Final = (".py", ".cpp", ".h", ".inc")
"""How files of code end."""
SETTINGS: Final = ("global_batch", "seed", "total_steps", "precision", "strategy")
"""Where these differ, other rows or another state would be trained."""
MADE_OF: Final = ("rows", "tokenizer", "model_config")
"""Digests that must be the same."""
ADAPTERS: Final = ("base_weights", "lora_rank", "lora_alpha", "lora_targets")
"""Of strategy lora: what adapters stand beside, and how; their checkpoints do not hold it."""
TOLD_ONLY: Final = ("code", "software")
"""A run may go on with newer versions of this project and what it stands on; that is said."""
CHANGED: Final = ("optim.", "lora.dropout")
"""Settings that a person may change on the way; that is said, too."""
SOFTWARE: Final = ("torch", "transformers", "trl", "accelerate", "peft", "deepspeed")
"""Whose versions decide what a step computes."""
NAMES: Final = {
    "rows": "data (packed rows)",
    "model_config": "model config",
    "code": "falcon-dist code",
    "base_weights": "base weights (fingerprint)",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_targets": "lora.targets",
}
WEIGHTS: Final = "model.safetensors"
BLOCKS: Final = 64
"""Places of each weights file that a fingerprint reads."""
BLOCK_BYTES: Final = 64 << 10
SHOWN: Final = 12
"""Digits of a digest that a person is shown."""
Difference = tuple[str, str, str]
"""What, then, now."""


def identity_of(model: str, config: ModelConfig) -> dict[str, str]:
    """Hex sha256 of the tokenizer, the model's configuration and this package's code, and the versions below it.

    Args:
        model: folder or hub name; of adapters, the configuration is that of the model they were trained on.
        config: which revision of it.
    """
    return {
        "tokenizer": _digest(model, config, TOKENIZER_FILES),
        "model_config": _digest(base_of(model), config, ("config.json",)),
        "code": code_digest(Path(next(iter(falcon_dist.__path__)))),
        "software": software(),
    }


def digest_of(identity: Mapping[str, str]) -> bytes:
    """32 bytes that stand for what all hosts have to agree on: model and tokenizer, not versions of software. Pure."""
    told = {name: value for name, value in identity.items() if name not in TOLD_ONLY}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()


def software() -> str:
    """ "torch 2.13.0, transformers 5.23.0, ..." of what is installed."""
    found = {name: metadata.version(name) for name in SOFTWARE if importlib.util.find_spec(name)}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def unshared(model: str, config: TrainConfig) -> dict[str, str]:
    """What hosts have to agree on besides, where no rank is sent rank 0's weights before the first step."""
    return {"base_weights": _fingerprint(base_of(model), config.model)} if config.strategy == "full-lowmem" else {}


def adapters_identity(model: str, config: TrainConfig) -> dict[str, str]:
    """What adapters are trained beside; nothing for strategies whose checkpoints hold all weights.

    Raises:
        UserError: the list of the weights' files is none.
    """
    if config.strategy != "lora":
        return {}
    lora = config.lora
    return {
        "base_weights": _fingerprint(base_of(model), config.model),
        "lora_rank": str(lora.rank),
        "lora_alpha": f"{lora.alpha:g}",
        "lora_targets": ", ".join(sorted(lora.targets)) or "the attention's",
    }


def check_base(adapters: Path | str, base: ModelConfig) -> None:
    """Raises UserError where adapters of ours would come beside other weights than those they were trained with."""
    try:
        then = checkpoint.read(Path(adapters)).facts.get("base_weights")
        now = _fingerprint(base.name, base) if then and _weights_files(base.name, base) else then
    except (checkpoint.DamagedError, OSError):  # of somebody else, or a hub out of reach: whoever loads it says so
        return
    if then != now:
        raise UserError(
            f'{adapters}: these adapters were trained on other weights than those of "{base.name}" (fingerprint '
            f"{_short(then)} then, {_short(now)} now); put those back, or falcon merge with --base MODEL that has them"
        )


def _fingerprint(model: str, config: ModelConfig) -> str:
    """Hex sha256 over name, size and BLOCKS evenly spaced blocks of every weights file.

    A few MB of each are read, for a model may have hundreds of GB. Other weights show in it; one changed byte need not.
    """
    whole = hashlib.sha256()
    for path in _weights_files(model, config):
        size = path.stat().st_size
        whole.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for place in sorted({max(0, size - BLOCK_BYTES) * n // (BLOCKS - 1) for n in range(BLOCKS)}):
                file.seek(place)
                whole.update(file.read(BLOCK_BYTES))
    return whole.hexdigest()


def _weights_files(model: str, config: ModelConfig) -> list[Path]:
    """The files that transformers takes the weights from, in order of their names; none where there are none."""
    index = None if _found(model, config, WEIGHTS) else _found(model, config, f"{WEIGHTS}.index.json")
    try:
        names = sorted({*json.loads(index.read_bytes())["weight_map"].values()}) if index else [WEIGHTS]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'model.name: "{index}" does not list the files of the weights; fetch it again') from error
    return [path for name in names if (path := _found(model, config, name))]


def _digest(model: str, config: ModelConfig, names: Sequence[str]) -> str:
    whole = hashlib.sha256()
    for name in names:
        if found := _found(model, config, name):
            whole.update(f"{name}\0".encode() + _content(found))
    return whole.hexdigest()


def _found(model: str, config: ModelConfig, name: str) -> Path | None:
    """A file of a folder or hub name, where it has one of this name."""
    revision = "main" if Path(model).exists() else config.revision or "main"
    found = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


def _content(path: Path) -> bytes:
    """A file's bytes; of JSON what it says, without the version of the library that wrote it."""
    if path.suffix != ".json":
        return path.read_bytes()
    values = json.loads(path.read_bytes())
    if isinstance(values, dict):
        values.pop("transformers_version", None)
    return json.dumps(values, sort_keys=True).encode()


def code_digest(package: Path) -> str:
    """Hex sha256 of every file of Python and C++ below a folder, and its name."""
    whole = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in CODE):
        whole.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return whole.hexdigest()


def differences(then: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]) -> list[Difference]:
    """What is not as it was, of the facts that the checkpoint tells. Pure."""
    both = [key for key in keys if key in then and key in now]  # what only one strategy has goes with "strategy"
    return [(NAMES.get(k, k), _short(then[k]), _short(now[k])) for k in both if then[k] != now[k]]


def unknown(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a checkpoint does not tell of, because it was saved before this was kept. Pure."""
    asked = (*MADE_OF, *(key for key in ADAPTERS if key in now), *TOLD_ONLY)
    return [NAMES.get(key, key) for key in asked if key not in then]


def table(rows: Sequence[Difference]) -> list[str]:
    """The differences as lines in columns. Pure."""
    whole = [("", "then", "now"), *rows]
    widths = [max(len(row[column]) for row in whole) for column in range(3)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in whole]


def _short(value: Any) -> str:
    text = str(value)
    return text[:SHOWN] if len(text) == hashlib.sha256().digest_size * 2 else text
