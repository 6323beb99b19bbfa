"""falcon-launch on this machine with real processes: what reaches a rank, and what a run leaves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
LAUNCH, FALCON = str(BIN / "falcon-launch"), str(BIN / "falcon")

two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cpus")

ALL_REDUCE = """
import os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1, bias=False))
model(torch.full((1, 2), float(dist.get_rank()))).sum().backward()
ones = torch.ones(1)
dist.all_reduce(ones)
listening = [line.split()[1] for line in open("/proc/net/tcp").readlines()[1:] if line.split()[3] == "0A"]
port = f":{int(os.environ['MASTER_PORT']):04X}"
print("sum", int(ones), "grad", model.module.weight.grad[0, 0].item(), "args", sys.argv[1:])
print("store on", [a.split(":")[0] for a in listening if a.endswith(port)])
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # torch 2.13 with gloo can abort while the interpreter is taken down; that is not what is tested
"""
TELL = """
import json, os, sys
fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
print(json.dumps({"cpus": sorted(os.sched_getaffinity(0)), "env": dict(os.environ), "argv": sys.argv[1:],
                  "stdin": os.readlink("/proc/self/fd/0"), "fds": [fd for fd in fds if fd > 2]}))
"""


NOT_FOR_A_PLAN = {"torch", "numpy", "transformers", "asyncio", "http", "email", "logging", "importlib.metadata"} | {
    f"launcher.{name}" for name in ("console", "report", "series", "run", "record", "supervise", "batch", "doctor")
}


def launch(folder, *args, env=None, timeout=120):
    full = {**os.environ, **(env or {})}
    words = [LAUNCH, *args]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False, env=full)


def run_of(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def told(folder, rank):
    return json.loads((run_of(folder) / f"attempt_1/rank_{rank:04d}/stdout").read_text())


@pytest.fixture
def tell(tmp_path):
    script = tmp_path / "it's a script.py"
    script.write_text(TELL)
    return script


@two_cores
def test_a_stock_ddp_script(tmp_path):
    (tmp_path / "script.py").write_text(ALL_REDUCE)
    done = launch(tmp_path, "--nproc-per-node", "2", "--", "script.py", "a b", "--log", "'q'")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"[rank {rank}] sum 2 grad 0.5 args ['a b', '--log', \"'q'\"]" in done.stdout
    assert "[rank 0] store on ['0100007F']" in done.stdout  # 127.0.0.1 and nothing else
    report = json.loads((run_of(tmp_path) / "report.json").read_text())
    assert (report["outcome"], report["exit_code"]) == ("ok", 0)


@two_cores
def test_ranks_sit_where_they_were_planned(tmp_path, tell):
    done = launch(tmp_path, "--nproc-per-node", "2", "--", tell.name, "x;y", "$HOME", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads((run_of(tmp_path) / "plan.json").read_text())
    ranks = [told(tmp_path, 0), told(tmp_path, 1)]
    assert not set(ranks[0]["cpus"]) & set(ranks[1]["cpus"])
    for seen, planned in zip(ranks, plan["nodes"][0]["ranks"], strict=True):
        assert seen["env"]["FALCON_CPUS"] == planned["binding"]["cpus"] == ",".join(map(str, seen["cpus"]))
        assert seen["env"]["OMP_NUM_THREADS"] == str(len(seen["cpus"]))
        assert seen["argv"] == ["x;y", "$HOME", "--json"]
        assert seen["stdin"] == "/dev/null"
        assert seen["fds"] in ([3, 10], [10])  # 3 is listdir's own
    assert "bindings: as planned on all ranks" in done.stdout


def test_a_module_and_a_script_without_dashes(tmp_path, tell):
    (tmp_path / "mod.py").write_text(TELL)
    assert launch(tmp_path, "--nproc-per-node=1", "-m", "mod", "-m", "x").returncode == 0
    assert told(tmp_path, 0)["argv"] == ["-m", "x"]
    shutil.rmtree(tmp_path / "runs")
    assert launch(tmp_path, "--nproc_per_node", "1", tell.name, "--nproc_per_node", "7").returncode == 0
    assert told(tmp_path, 0)["argv"] == ["--nproc_per_node", "7"]


def test_the_environment_is_listed_and_secrets_stay_out_of_files(tmp_path, tell):
    env = {"HF_TOKEN": "hf_s3cret", "FI_LOG_LEVEL": "warn", "STRAY": "1", "PYTHONPATH": "/nowhere"}
    done = launch(tmp_path, "--nproc-per-node=1", "--env", "MY_TOKEN=s3cret2", "--", tell.name, env=env)
    seen = told(tmp_path, 0)["env"]
    assert (seen["HF_TOKEN"], seen["MY_TOKEN"]) == ("hf_s3cret", "s3cret2")
    assert not {"FI_LOG_LEVEL", "STRAY", "PYTHONPATH"} & set(seen)
    assert "not passed on to ranks: FI_LOG_LEVEL, PYTHONPATH" in done.stdout
    kept = [p.read_text() for p in run_of(tmp_path).rglob("*.json")]
    assert kept
    assert not [text for text in kept if "s3cret" in text]
    assert run_of(tmp_path).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("words", [["--help"], ["--dry-run", "--", "script.py"], ["--dry-run"]])
def test_what_only_tells_writes_nothing_and_loads_only_what_a_plan_needs(tmp_path, words):
    # How long it takes is for benchmarks/plan_time.py: what it loads is most of it, and can be told without a clock.
    done = launch(tmp_path, *words, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []
    lines = done.stderr.splitlines()  # of the launcher and of the agent it asks
    loaded = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert {"launcher.cli", "launcher.planner"} < loaded
    assert ("launcher.crew" in loaded) == (words != ["--help"])
    assert not NOT_FOR_A_PLAN & loaded
    assert len([name for name in loaded if name.startswith(("launcher", "falcon_dist"))]) < 60


def test_an_agent_says_hello_with_little_loaded():
    code = "import sys, launcher.agent; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rest = {"launcher.doors", "launcher.examine", "launcher.survey", "launcher.config"}
    assert not (NOT_FOR_A_PLAN | rest) & set(done.stdout.split())


@pytest.mark.parametrize("way", ["--dry-run", "--slurm"])
def test_settings_that_contradict_each_other_are_told_before_the_plan(tmp_path, way):
    words = [way, "--set", "strategy=zero2", "--set", "precision=bf16-autocast"]
    done = launch(tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ('falcon-launch: precision: strategy "zero2" trains bf16 or fp32 weights: "bf16-autocast"\n')
    assert list(tmp_path.iterdir()) == []


def test_what_only_tells_never_imports_torch(tmp_path):
    trap = tmp_path / "trap" / "torch"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text("raise SystemExit('torch was imported')")
    for words in (["--help"], ["--dry-run"], ["--dry-run", "--json"]):
        done = launch(tmp_path, *words, env={"PYTHONPATH": str(trap.parent)})
        assert (done.returncode, done.stderr) == (0, "")


def test_dry_run_of_a_machine_we_do_not_have(tmp_path):
    saved = subprocess.run([FALCON, "topology"], capture_output=True, text=True, check=True).stdout
    wide = json.loads(saved)
    cores = [{"core": c, "cpus": str(c)} for c in range(8)]
    nodes = [{"numa_node": n, "memory_bytes": None, "cores": cores[4 * n : 4 * n + 4]} for n in (0, 1)]
    wide |= {"sockets": [{"socket": 0, "numa_nodes": nodes}], "allowed": "0-7", "mems_allowed": "0-1"}
    (tmp_path / "wide.json").write_text(json.dumps({**wide, "quota_cpus": None}))
    done = launch(tmp_path, "--topology", "wide.json", "--dry-run", "--json", "--", "x.py")
    ranks = json.loads(done.stdout)["nodes"][0]["ranks"]
    assert [(r["cpus"], r["mem_nodes"], r["threads"]) for r in ranks] == [("0-3", "0", 4), ("4-7", "1", 4)]


def test_falcon_report_tells_it_again(tmp_path, tell):
    launch(tmp_path, "--nproc-per-node=1", "--run-id", "one", "--", tell.name)
    done = subprocess.run([FALCON, "report", "one"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "outcome: ok" in done.stdout
    again = launch(tmp_path, "--nproc-per-node=1", "--run-id", "one", "--", tell.name)
    assert (again.returncode, "this run exists" in again.stderr) == (2, True)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--nproc-per-node", "4096", "--", "x.py"], 'fewer than ranks: "4096"'),
        (["--recipe", "nope"], 'no such recipe: "nope"'),
        (["--hostfile", "h"], '--hostfile: cannot be read: "h"'),
        (["--hostfil", "h"], 'did you mean "--hostfile"?'),
        (["--set", "optim.lrr=1"], 'did you mean "optim.lr"?'),
        (["--nproc-per-node", "1", "--", "missing.py"], 'no such script: "missing.py"'),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_2(tmp_path, words, fault):
    done = launch(tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert fault in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
