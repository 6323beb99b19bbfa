"""What a model of others may bring that could run code here, pickled weights and Python: refused, never read."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from falcon_dist.contract import UserError

PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""How files end that only ``torch.load`` or ``pickle`` read."""
CURE: Final = (
    "reading it can run code, so convert it to safetensors once, where you trust it: "
    "AutoModelForCausalLM.from_pretrained(OLD, use_safetensors=False).save_pretrained(NEW)"
)


def check_weights(source: Path | str) -> None:
    """Refuses a folder whose weights are nothing but pickle; a name on a hub, or no weights at all, is not judged here.

    Raises:
        UserError: naming the first such file.
    """
    folder = Path(source)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES and path.name[0] != ".")
    weights = [name for name in pickled if name != "training_args.bin"]  # what transformers' Trainer leaves beside them
    if weights:
        raise UserError(f'model.name: no safetensors in "{source}", only pickle: "{weights[0]}"; {CURE}')


def reason(source: Path | str, error: BaseException) -> str:
    """Why transformers does not load this, in one line that asks for nothing that we never do."""
    said = str(error)
    if isinstance(error, SafetensorError):
        return f"{_damaged(Path(source))}{said}"
    if "trust_remote_code" in said:
        return (
            f"it needs Python code of its own{_code_in(source)}, which is not run; take a model that transformers knows"
        )
    if "use_safetensors" in said:
        return f"it has no safetensors, perhaps only pickle; {CURE}"
    return next(iter(said.strip().splitlines()), type(error).__name__)


def _code_in(source: Path | str) -> str:
    names = sorted(path.name for path in Path(source).glob("*.py")) if Path(source).is_dir() else []
    return f" ({', '.join(names)})" if names else ""


def _damaged(folder: Path) -> str:
    """The first file of weights that is none, as the beginning of a sentence."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                continue
        except SafetensorError:
            return f"{path.name}: "
    return ""
