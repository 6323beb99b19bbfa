"""Facts of one host that only torch can tell: the instruction set that oneDNN's kernels really use."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_LINEAR: Final = """
import torch
layer = torch.nn.Linear(256, 256).to(torch.bfloat16)
layer(torch.randn(64, 256, dtype=torch.bfloat16))
"""
_SECONDS: Final = 120
_NAMES: Final = (
    ("amx", "AMX"),
    ("avx512_core_fp16", "AVX512_FP16"),
    ("avx10", "AVX10"),
    ("avx512_core_bf16", "AVX512_BF16"),
    ("avx512_core_vnni", "AVX512_VNNI"),
    ("avx512", "AVX512"),
    ("avx2", "AVX2"),
    ("ref", "no vector kernel (reference code)"),
)
"""A part of a kernel's name and what people call its instruction set, the most telling first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelIsa:
    """What a bf16 linear layer ran on."""

    name: str
    """AMX, AVX512_BF16, ..., or "not oneDNN"."""
    kernel: str | None
    """oneDNN's implementation, as "brg_matmul:avx512_core_amx"."""
    detected: str | None
    """The best instruction set that oneDNN sees on this cpu, under its cap."""
    cap: str | None
    """ONEDNN_MAX_CPU_ISA, where it is set."""

    def line(self) -> str:
        """For a person."""
        cap = f"; capped by ONEDNN_MAX_CPU_ISA={self.cap}" if self.cap else ""
        return f"bf16 linear layer: {self.name} ({self.kernel or 'no oneDNN kernel'}); cpu: {self.detected}{cap}"


def kernel_isa(env: Mapping[str, str] = os.environ) -> KernelIsa:
    """Runs a bf16 linear layer in a child process under oneDNN's verbose mode and reads what it ran on.

    Raises:
        RuntimeError: the child did not end well.
    """
    words = [sys.executable, "-P", "-c", _LINEAR]
    told = {**env, "ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=told, capture_output=True, text=True, timeout=_SECONDS, check=False)
    if done.returncode:
        last = next(iter(reversed(done.stderr.strip().splitlines())), "no reason given")
        raise RuntimeError(f"a bf16 linear layer does not run: {last}")
    return read_verbose(done.stdout, env.get("ONEDNN_MAX_CPU_ISA"))


def read_verbose(text: str, cap: str | None = None) -> KernelIsa:
    """oneDNN's verbose lines -> the kernel that multiplied (the format: oneDNN developer guide, "Verbose mode")."""
    detected = re.search(r"^onednn_verbose,.*\binfo,cpu,isa:(.*)$", text, re.MULTILINE)
    ran = re.search(r"^onednn_verbose,.*\bexec,cpu,(?:matmul|inner_product),([^,]+),", text, re.MULTILINE)
    kernel = ran.group(1) if ran else None
    name = next((name for part, name in _NAMES if kernel and part in kernel), kernel or "not oneDNN")
    return KernelIsa(name=name, kernel=kernel, detected=detected.group(1).strip() if detected else None, cap=cap)
