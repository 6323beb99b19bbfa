"""What a host tells where its probe or its Python does not do its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launcher import examine, probe
from launcher.doctor import _alike

LINE = "onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core_bf16,undef,src:bf16,,,64x256:256x256,0.1"
GOOD = f"""echo "{LINE}"; echo '{{"torch": "2.13.0"}}'"""


@pytest.fixture
def torch_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Has a host examined by programs that stand for the probe and for Python; what needs torch, and what is alike."""

    def script(name: str, body: str) -> str:
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
        return str(tmp_path / name)

    def run(compiled: str, python: str = "echo Python was asked >&2; exit 1", with_leak: bool = False) -> Any:
        monkeypatch.setattr("sys.executable", script("python", python))
        found = {"path": script("compiled", compiled), "torch": "/t", "oneccl": "/o"}
        told = examine.host(with_torch=True, with_leak=with_leak, seat={}, probe=found)
        return told["torch"], told["alike"]

    return run


def test_where_there_is_a_probe_no_torch_is_imported(torch_facts) -> None:
    assert torch_facts(GOOD) == ({"torch": "2.13.0", "bf16_kernel": "brg_matmul:avx512_core_bf16"}, {})


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("kill -SEGV $$", "probe: exit code -11"),
        ("echo no library >&2; exit 127", "probe: no library"),
        ("echo 17", "probe: exit code 0"),
        ("exec sleep 100", "probe: no answer within 0.3 s"),
    ],
)
def test_a_probe_that_dies_or_hangs_is_named(torch_facts, monkeypatch, body: str, fault: str) -> None:
    monkeypatch.setattr(examine, "TORCH_S", 0.3)
    assert torch_facts(body) == ({"fault": fault}, {})


def test_python_looks_for_leaks_beside_the_probe(torch_facts) -> None:
    own, alike = torch_facts(GOOD, """echo '{"leak": 0.5, "torch": "2"}'""", with_leak=True)
    assert (own["torch"], alike) == ("2.13.0", {"leak": 0.5})


def test_a_torch_that_cannot_be_imported_is_told_beside_the_probe(torch_facts) -> None:
    own, alike = torch_facts(GOOD, "echo ImportError: no _C >&2; exit 1", with_leak=True)
    assert ("fault" in own, alike) == (False, {"fault": "ImportError: no _C"})
    assert _alike(alike, None) == alike
    assert _alike(alike, "node1") == {"fault": "ImportError: no _C (on node1)"}
    assert _alike({"leak": 0.5}, "node1") == {"leak": 0.5}


def test_without_a_probe_python_tells(torch_facts, monkeypatch) -> None:
    torch_facts(GOOD, """echo '{"leak": 0.5, "torch": "2"}'""")
    told = examine.host(with_torch=True, with_leak=True, seat={}, probe={})
    assert told["torch"] == {"leak": 0.5, "torch": "2", "bf16_kernel": None}
    assert told["alike"] == {"leak": 0.5}


def test_packages_differ_by_their_files_not_by_what_is_compiled_of_them(tmp_path: Path) -> None:
    (tmp_path / "torch" / "__pycache__").mkdir(parents=True)
    source = tmp_path / "torch" / "functional.py"
    source.write_text("pass\n")
    whole = probe._packages(tmp_path / "torch")
    (tmp_path / "torch" / "__pycache__" / "functional.pyc").write_text("any")
    assert probe._packages(tmp_path / "torch") == whole
    source.write_text("pas")
    assert probe._packages(tmp_path / "torch") != whole


def test_a_host_where_nothing_was_built_has_no_probe(tmp_path: Path) -> None:
    assert probe.find({"XDG_CACHE_HOME": str(tmp_path)}) == probe.NONE


def test_a_torch_that_cannot_be_read_is_left_to_python(monkeypatch) -> None:
    def broken(environ: object) -> None:
        raise PermissionError("torch/version.py")

    monkeypatch.setattr("falcon_dist.ccl_recipe.recipe", broken)
    assert probe.find({}) == probe.NONE


def test_a_probe_finds_libraries_and_a_way_to_the_others(monkeypatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/users")
    monkeypatch.setenv("FI_PROVIDER", "verbs")
    found = {"path": "/p", "torch": "/t", "oneccl": "/o"}
    assert probe.environment(found, {}) == {"LD_LIBRARY_PATH": "/t:/o:/users"}
    env = probe.environment(found, {"FI_TCP_IFACE": "eth7"})
    assert (env["CCL_KVS_IFACE"], env["FI_PROVIDER_PATH"]) == ("eth7", "/o")
    assert "FI_PROVIDER" not in env
