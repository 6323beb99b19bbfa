"""Who may import whom in launcher/, and that none of it needs more than the standard library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {
    "values": ["errors", "cpuset", "hostnames", "redaction", "binding", "patience", "frames", "onednn"],
    "describe": [
        *("hostfile", "hostselect", "network", "topology", "config", "earlier", "env_file", "cluster", "plan"),
        *("slurm", "slurmjob", "jobsettings", "launchsettings"),
    ],
    "decide": [
        "placement",
        "explain",
        "environment",
        "backends",
        "engines",
        "planner",
        "events",
        "supervise",
        "watch",
        "standing",
        "straggler",
        "retry",
        "ledger",
        "report",
        "record",
        "render",
        "checks",
        "diagnosis",
    ],
    "act": [
        *(
            "bind",
            "sysfs",
            "memory",
            "wire",
            "transport",
            "silence",
            "effort",
            "stacks",
            "interrupts",
            "child",
            "crew",
            "doors",
            "hello",
            "survey",
            "probe",
            "examine",
            "roster",
        ),
        *(
            "rundir",
            "agent",
            "courier",
            "discover",
            "doctor",
            "folder",
            "running",
            "mirror",
            "command",
            "console",
            "outlet",
            "run",
            "series",
            "branch",
            "batch",
            "trunk",
            "reach",
        ),
    ],
    "enter": ["flags", "cli", "verbs"],
}
ORDER = list(LAYERS)
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}
MODULES = sorted(p.stem for p in (ROOT / "launcher").glob("*.py") if p.stem != "__init__")
PURE = [m for m in MODULES if LAYER_OF.get(m) in ORDER[:3]]
EFFECTS = {"os", "subprocess", "socket", "time"}


def imports_of(path: Path) -> set[str]:
    """Every imported module, as launcher.cpuset and not as launcher."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= parts if node.module in ("launcher", "falcon_dist") else {str(node.module)}
    return found


def test_every_module_has_a_layer():
    assert sorted(LAYER_OF) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_sees_its_own_layer_and_those_before(module):
    own = ORDER.index(LAYER_OF[module])
    ours = [name.split(".")[1] for name in imports_of(ROOT / f"launcher/{module}.py") if name.startswith("launcher.")]
    assert [other for other in ours if ORDER.index(LAYER_OF[other]) > own] == []


@pytest.mark.parametrize("module", MODULES)
def test_only_the_contract_is_taken_from_falcon_dist(module):
    theirs = {name for name in imports_of(ROOT / f"launcher/{module}.py") if name.startswith("falcon_dist.")}
    agreed = {"falcon_dist.contract", "falcon_dist.config", "falcon_dist.agreement", "falcon_dist.old_names"}
    assert theirs <= agreed | {"falcon_dist.ccl_environment", "falcon_dist.ccl_intel", "falcon_dist.ccl_recipe"}


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_have_no_effects(module):
    assert not {name.split(".")[0] for name in imports_of(ROOT / f"launcher/{module}.py")} & EFFECTS


@pytest.mark.parametrize("path", sorted((ROOT / "falcon_dist").rglob("*.py")), ids=lambda p: p.stem)
def test_the_rank_program_does_not_know_the_launcher(path):
    assert not [name for name in imports_of(path) if name.split(".")[0] == "launcher"]


@pytest.mark.parametrize("module", ["cli", "verbs", "agent", "run", "record", "console", "examine"])
def test_the_standard_library_is_enough(module):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import launcher.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("module", MODULES)
def test_files_are_read_in_one_sitting(module):
    assert len((ROOT / f"launcher/{module}.py").read_text().splitlines()) < 300
