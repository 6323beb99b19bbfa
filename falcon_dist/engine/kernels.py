"""Elementwise passes of a step: in one go each by a small library of C++, or by torch's own operators.

The library serves bfloat16 on CPUs. It is compiled in seconds where a C++ compiler is, for this very processor, and
kept in the user's cache; segment_kernel.py calls what it has of attention. Everything else, and every machine without
a compiler, goes by torch's operators: the same mathematics in several passes, so that what is kept for backward never
depends on which it was.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from falcon_dist.durable import synchronise
from falcon_dist.packaged import cache_folder

_log = logging.getLogger(__name__)

SOURCES: Final = tuple(Path(__file__).with_name(name) for name in ("kernels.cpp", "attention.cpp"))
_FLAGS: Final = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-ffp-contract=fast"),
    *("-fno-math-errno", "-fno-trapping-math"),  # what is not a number is still passed on
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)
_TIMEOUT_S: Final = 120
_SQUARES: Final = 4096
"""Numbers whose squares make one sum: kPiece of the source."""


@cache
def loaded() -> ctypes.CDLL | None:
    """The kernels; None where there is no compiler, or none whose work can be kept and run."""
    name = os.environ.get("CXX") or "g++"
    compiler = shutil.which(name)
    if compiler is None:
        if name != "g++":
            _log.warning("training is slower here without kernels of its own: CXX names no program: %r", name)
        return None
    try:
        return _opened(compiler)
    except (OSError, subprocess.SubprocessError) as fault:
        said = getattr(fault, "stderr", None) or str(fault)
        said = said if isinstance(said, str) else said.decode(errors="replace")  # bytes where it took too long
        reason = next((line for line in said.splitlines() if "error" in line), said.partition("\n")[0])
        _log.warning("training is slower here, for its kernels cannot be compiled or loaded: %s", reason)
        return None


def _opened(compiler: str) -> ctypes.CDLL:
    """Compiled for this processor, once, and again where what was kept is no library."""
    sources = (source.read_bytes() for source in (*SOURCES, *sorted(SOURCES[0].parent.glob("*.h"))))
    program = Path(compiler).stat()  # of another version it may know more of the processor
    made_by = (compiler, program.st_size, program.st_mtime_ns, _FLAGS, platform.libc_ver())
    facts = [*sources, repr(made_by).encode(), _processor()]
    kept = cache_folder() / "kernels" / f"{hashlib.sha256(b'|'.join(facts)).hexdigest()[:32]}.so"
    if kept.is_file():
        with suppress(OSError):
            return ctypes.CDLL(str(kept))
    _compile(compiler, kept)
    return ctypes.CDLL(str(kept))


def _compile(compiler: str, target: Path) -> None:
    """Renamed when whole, so that ranks that compile at once do no harm."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as name:
        compiled, made = {source: f"{name}/{source.stem}.o" for source in SOURCES}, Path(name) / "kernels.so"
        # Linked without OpenMP: its symbols are those of the library that torch has loaded, with its threads.
        for argv in (
            *([compiler, *_FLAGS, "-c", str(source), "-o", to] for source, to in compiled.items()),
            [compiler, "-shared", *compiled.values(), "-o", str(made)],
        ):
            subprocess.run(argv, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
        synchronise(made)
        made.rename(target)


def _processor() -> bytes:
    """What hosts that share a cache may differ in."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = {line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))}
    return "\n".join(sorted(told)).encode()


def takes(*tensors: Tensor) -> bool:
    """Whether there are kernels for these, once contiguous; fake tensors and those of other devices have no data."""
    return all(_is_plain(x) and x.dtype == torch.bfloat16 for x in tensors) and loaded() is not None


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu


def _taken(*tensors: Tensor) -> ctypes.CDLL | None:
    """The library, where it takes these as they are."""
    return loaded() if all(x.is_contiguous() for x in tensors) and takes(*tensors) else None


def _holds(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the library may take its memory for numbers of this kind, in order."""
    return tensor.dtype == dtype and tensor.is_contiguous()


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, of the shape that both have."""
    if (lib := _taken(gate, up)) is None:
        return nn.functional.silu(gate) * up
    out = torch.empty_like(gate)
    lib.swiglu(_at(gate), _at(up), _at(out), ctypes.c_long(gate.numel()), _threads())
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    if (lib := _taken(grad, gate, up)) is None:
        of_gate: Tensor = torch.ops.aten.silu_backward(grad * up, gate)
        return of_gate, grad * nn.functional.silu(gate)
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    places = (_at(x) for x in (grad, gate, up, of_gate, of_up))
    lib.swiglu_backward(*places, ctypes.c_long(gate.numel()), _threads())
    return of_gate, of_up


def rms(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[..., W] -> ``weight * x * scale`` and the fp32 scale [..., 1], one over the root of x's mean square."""
    if (lib := _taken(x, weight)) is None:
        exact = x.float()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True).add_(eps))
        return weight * (exact * scale).to(x.dtype), scale
    out, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    size = (ctypes.c_long(scale.numel()), ctypes.c_long(x.shape[-1]))
    lib.rms(_at(x), _at(weight), _at(out), _at(scale), *size, ctypes.c_float(eps), _threads())
    return out, scale


def rms_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    if (lib := _taken(grad, x, weight)) is None:
        normal, exact = x.float() * scale, grad.float()
        of_weight = (exact * normal).flatten(0, -2).sum(0)
        weighted = exact * weight.float()
        mean = (weighted * normal).mean(-1, keepdim=True)
        return weighted.sub_(normal.mul_(mean)).mul_(scale).to(x.dtype), of_weight.to(weight.dtype)
    threads, width = torch.get_num_threads(), x.shape[-1]
    of_x, sums = torch.empty_like(x), torch.zeros(threads, width, dtype=torch.float32)
    places = (_at(y) for y in (grad, x, weight, scale, of_x, sums))
    lib.rms_backward(*places, ctypes.c_long(scale.numel()), ctypes.c_long(width), ctypes.c_int(threads))
    return of_x, sums.sum(0).to(weight.dtype)


def turn(heads: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool) -> bool:
    """Writes [B, T, H, D] heads, turned by [B, T, D] or [1, T, D] angles, to ``out``; whether this could be done."""
    batch, length, count, width = heads.shape
    angled = cos.shape == sin.shape and cos.shape in ((1, length, width), (batch, length, width))
    lib = _taken(cos, sin) if angled and out.shape == heads.shape else None
    if lib is None or not all(_in_tokens(x) for x in (heads, out)):
        return False
    sizes = (batch * length, cos.shape[0] * length, count, width, heads.stride(1), out.stride(1))
    places = (_at(x) for x in (heads, cos, sin, out))
    lib.turn(*places, *map(ctypes.c_long, sizes), ctypes.c_float(-1.0 if back else 1.0), _threads())
    return True


def _in_tokens(heads: Tensor) -> bool:
    """Whether each token's heads lie side by side, and tokens at even distances."""
    plain = type(heads) is Tensor and heads.dtype == torch.bfloat16
    batch, length, _, width = heads.shape
    even = batch == 1 or heads.stride(0) == length * heads.stride(1)
    return plain and even and heads.stride()[2:] == (width, 1)


def causal_softmax(scores: Tensor, queries: int, scale: float) -> tuple[Tensor, Tensor]:
    """bf16 probabilities of [N, S x queries, K] fp32 scores, overwritten, and their log-sum-exp, by the library.

    The last of each ``queries`` stands beside the last key, and none looks ahead.
    """
    lib = loaded()
    assert lib is not None
    assert _holds(scores, torch.float32)
    weights = torch.empty(scores.shape, dtype=torch.bfloat16)
    norms = torch.empty(scores.shape[:-1], dtype=torch.float32)
    sizes = map(ctypes.c_long, (norms.numel(), queries, scores.shape[-1]))
    lib.causal_softmax(_at(scores), _at(weights), _at(norms), *sizes, ctypes.c_float(scale), _threads())
    return weights, norms


def causal_gradient_(
    scores: Tensor, gradients: Tensor, norms: Tensor, dots: Tensor, *, queries: int, scale: float
) -> Tensor:
    """bf16 probabilities of such scores again; their gradients become those of the products of query and key."""
    lib = loaded()
    weights, kept = torch.empty_like(gradients), (norms.contiguous(), dots.contiguous())
    assert lib is not None
    assert all(_holds(x, torch.float32) for x in (scores, *kept))
    assert _holds(gradients, torch.bfloat16)
    assert gradients.shape == scores.shape
    assert norms.numel() == dots.numel() == scores[..., 0].numel()
    places = (_at(x) for x in (scores, gradients, weights, *kept))
    sizes = map(ctypes.c_long, (norms.numel(), queries, scores.shape[-1]))
    lib.causal_gradient(*places, *sizes, ctypes.c_float(scale), _threads())
    return weights


def softmax_gradient_(logits: Tensor, labels: Tensor, factor: float) -> Tensor | None:
    """As that of head.py, with the losses [N], not summed; None, and nothing done, where it cannot be."""
    if (lib := _taken(logits)) is None:
        return None
    losses, labels = torch.empty(len(logits), dtype=torch.float32), labels.contiguous()
    size = (ctypes.c_long(logits.shape[0]), ctypes.c_long(logits.shape[1]))
    lib.softmax_gradient(_at(logits), _at(labels), _at(losses), *size, ctypes.c_float(factor), _threads())
    return losses


def square_sum(x: Tensor) -> float | None:
    """The sum of the squares of bf16 or fp32 numbers, in one pass; None where it cannot be."""
    name = {torch.bfloat16: "square_sums_of_bf16", torch.float32: "square_sums_of_float"}.get(x.dtype)
    if name is None or not _is_plain(x) or not x.is_contiguous() or (lib := loaded()) is None:
        return None
    sums = torch.empty(-(-x.numel() // _SQUARES), dtype=torch.float64)
    getattr(lib, name)(_at(x), _at(sums), ctypes.c_long(x.numel()), _threads())
    return float(sums.sum())
