"""What oneDNN says of its kernels, read; and the real thing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from falcon_dist.engine.widened import multiplies_bf16
from launcher.onednn import VERBOSE, WITH_BF16, first_kernel, instruction_set

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
    assert first_kernel(HEAD + RAN.format(kernel) + RAN.format("later")) == kernel
    assert instruction_set(kernel) == name


def test_no_line_is_no_onednn() -> None:
    assert instruction_set(first_kernel(HEAD)) == "not oneDNN"


def test_a_cap_shows_in_the_kernel_that_runs() -> None:
    assert instruction_set(first_kernel(facts(ONEDNN_MAX_CPU_ISA="AVX2"))) not in WITH_BF16


def test_only_who_is_asked_for_it_looks_for_leaks() -> None:
    """Without the model, whose import takes longer than torch's."""
    without, told = facts(), facts("--leak")
    assert (instruction_set(first_kernel(without)) != "not oneDNN") == multiplies_bf16()
    assert "leak" not in json.loads(without.splitlines()[-1])
    assert json.loads(told.splitlines()[-1])["leak"] == 0.0


def facts(*words: str, **env: str) -> str:
    """What the program prints under oneDNN's verbose mode."""
    known = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    argv = [sys.executable, "-P", "-m", "falcon_dist.host_facts", *words]
    done = subprocess.run(argv, env={**known, **VERBOSE, **env}, capture_output=True, text=True, check=True)
    return done.stdout
