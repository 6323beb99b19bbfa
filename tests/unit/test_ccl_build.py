"""What is said when oneCCL cannot be built or loaded, and which interface is taken."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import falcon_dist.ccl
from falcon_dist import ccl_recipe
from falcon_dist.ccl import build as ccl_build
from falcon_dist.ccl.hosts import check_interface, route_interface
from falcon_dist.contract import UserError


def test_a_missing_library_is_one_line_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCL_ROOT", str(tmp_path))
    reason = falcon_dist.ccl.unavailable()
    assert reason is not None
    assert "pip install" in reason
    assert "\n" not in reason


def test_a_missing_compiler_is_one_line_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "install g++" in (falcon_dist.ccl.unavailable() or "")


def test_a_failing_compiler_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXXFLAGS", "-no-such-flag")
    with pytest.raises(UserError, match="no-such-flag"):
        ccl_build.ensure_built()
    left = {path.suffix for path in (tmp_path / "falcon-dist" / "ccl").iterdir()}
    assert left == {".lock"}


def test_flags_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXXFLAGS", raising=False)
    plain = ccl_build.recipe().key
    monkeypatch.setenv("CXXFLAGS", "-march=native")
    assert ccl_build.recipe().key != plain


def test_a_torch_that_does_not_tell_its_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text("__version__: str = '2.9.0+cpu'\ngit_version = 'c0ffee'\n")
    told = ccl_recipe.read_torch(tmp_path)
    assert (told.version, told.commit) == ("2.9.0+cpu", "c0ffee")
    (tmp_path / "version.py").write_text("__vers")
    with pytest.raises(UserError, match="does not tell the version of torch"):
        ccl_recipe.read_torch(tmp_path)


def test_the_loops_compile_with_the_oldest_compiler(tmp_path: Path) -> None:
    """g++ 11 has no dispatcher for the levels of x86-64; where it is not installed, their absence is looked at."""
    source = ccl_build.SOURCES / "kernels.cpp"
    assert "target_clones(" not in source.read_text() + (ccl_build.SOURCES / "loops.inc").read_text()
    compiler = shutil.which("g++-11") or shutil.which("g++")
    assert compiler
    argv = [compiler, "-std=c++20", "-O1", "-fsyntax-only" if compiler.endswith("g++") else "-c", str(source)]
    subprocess.run([*argv, "-o", str(tmp_path / "kernels.o")], check=True)


def test_of_two_ranks_that_enter_at_once_one_sees_the_other(tmp_path: Path) -> None:
    """Each writes its call to the board and reads the other's: without a fence both reads may come too early."""
    program = tmp_path / "board"
    sources = [Path(__file__).parent / "board.cpp", ccl_build.SOURCES / "board.cpp"]
    argv = ["g++", "-std=c++20", "-O2", f"-I{ccl_build.SOURCES}", *map(str, sources), "-pthread", "-o", str(program)]
    subprocess.run(argv, check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 of 20000 calls were missed by both"


def test_loopback_goes_over_lo() -> None:
    assert route_interface("127.0.0.1") == "lo"
    assert route_interface("localhost") == "lo"


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="no route to the master address"):
        route_interface("no-such-host.invalid")


def test_an_interface_that_is_not_there_is_refused() -> None:
    check_interface("lo")
    with pytest.raises(UserError, match='FI_TCP_IFACE: no such interface: "none7"; this host has lo'):
        check_interface("none7")
