"""What oneDNN says of its kernels, read; and the real thing."""

from __future__ import annotations

import os

import pytest

from falcon_dist.doctor import kernel_isa, read_verbose

HEAD = "onednn_verbose,v1,info,cpu,isa:Intel AVX-512 with AVX512BW\n"
RAN = "onednn_verbose,v1,primitive,exec,cpu,matmul,{},undef,src:bf16::blocked:ab::f0,,,64x256:256x256,0.1\n"


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("brg_matmul:avx10_1_512_amx", "AMX"),
        ("brg_matmul:avx512_core_amx", "AMX"),
        ("jit:avx512_core_bf16", "AVX512_BF16"),
        ("brgemm:avx512_core_vnni", "AVX512_VNNI"),
        ("jit:avx512_core", "AVX512"),
        ("gemm:avx2", "AVX2"),
        ("ref:any", "no vector kernel (reference code)"),
        ("acl", "acl"),
    ],
)
def test_kernels_by_the_names_people_know(kernel: str, name: str) -> None:
    found = read_verbose(HEAD + RAN.format(kernel))
    assert (found.name, found.kernel, found.detected) == (name, kernel, "Intel AVX-512 with AVX512BW")


def test_no_line_is_no_onednn() -> None:
    assert read_verbose("").name == "not oneDNN"


def test_a_cap_is_obeyed_and_told() -> None:
    """A real linear layer: a cap below what the cpu has must show in the kernel that runs."""
    free = kernel_isa({k: v for k, v in os.environ.items() if k != "ONEDNN_MAX_CPU_ISA"})
    capped = kernel_isa({**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert free.detected
    assert capped.name not in ("AMX", "AVX512_BF16")
    assert capped.detected != free.detected
    assert capped.line().endswith("; capped by ONEDNN_MAX_CPU_ISA=AVX2")
