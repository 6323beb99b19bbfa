"""What oneDNN says of the kernels that it runs (its developer guide, "Verbose mode")."""

from __future__ import annotations

import re
from typing import Final

VERBOSE: Final = {"ONEDNN_VERBOSE": "1"}
"""Has a process tell on its stdout of every product that it runs."""
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
WITH_BF16: Final = frozenset(("AMX", "AVX10", "AVX512_FP16", "AVX512_BF16"))
"""Those that multiply bf16 as it is; on the others it is widened first, and slower than fp32."""


def first_kernel(text: str) -> str | None:
    """The implementation of the first product that verbose lines tell of, as "brg_matmul:avx512_core_amx"."""
    ran = re.search(r"^onednn_verbose,.*\bexec,cpu,(?:matmul|inner_product),([^,]+),", text, re.MULTILINE)
    return ran.group(1) if ran else None


def instruction_set(kernel: str | None) -> str:
    """AMX, AVX512_BF16, ..., by the name of a kernel; the name itself where none is known in it."""
    if kernel is None:
        return "not oneDNN"
    return next((name for part, name in _NAMES if part in kernel), kernel)
