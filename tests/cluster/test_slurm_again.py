"""Slurm jobs that are ended before they are done, and start again: the weights are those of an undisturbed run."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import BIN, environment, launch, weights_digest, write_inputs

from cluster.hosts import Hosts
from cluster.machine import parent_of, wait_until
from cluster.slurm import Slurm

LAUNCH = str(BIN / "falcon-launch")
STEPS = 40
SETTINGS = ["--nproc-per-node", "1", "--backend", "gloo", "--recipe", "recipe.toml"]
SETTINGS += ["--set", f"loop.max_steps={STEPS}", "--set", "evaluate.base=false", "--set", "checkpoint.every=5"]
SHAPE = ["--slurm", "--nnodes", "2", "--cpus-per-task", "2", "--time", "10"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    with Hosts(3, folder / "c") as hosts, Slurm(hosts, folder / "slurm", cpus=(2, 2, 2)) as three:
        yield three


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, inputs: Path) -> dict[str, str]:
    """Weights and optimizer of a job of the same shape that nobody disturbs."""
    job = submit(slurm, inputs, *SETTINGS)
    assert slurm.until(job, "COMPLETED", "FAILED", timeout=500)["ExitCode"] == "0:0"
    return weights_digest(inputs / f"runs/slurm-{job}/checkpoints/step-{STEPS:06d}")


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").symlink_to(inputs / "recipe.toml")
    return tmp_path


def script(slurm: Slurm, folder: Path, *words: str) -> Path:
    """What --slurm --dry-run prints."""
    done = slurm.run(LAUNCH, "--dry-run", *SHAPE, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    path = folder / "job.sh"
    path.write_text(done.stdout)
    return path


def start(slurm: Slurm, folder: Path, *words: str) -> subprocess.Popen[str]:
    """A launcher that submits a job and follows it."""
    env = {**environment(), **slurm.environment, "XDG_CACHE_HOME": environment()["XDG_CACHE_HOME"]}
    words = (LAUNCH, *SHAPE, *words)
    return slurm.hosts[0].enter(*words, cwd=folder, env=env, stdout=(folder / "log").open("w"))


def submit(slurm: Slurm, folder: Path, *words: str) -> int:
    path = script(slurm, folder, *words)
    done = slurm.run("sbatch", "--parsable", str(path), cwd=folder, XDG_CACHE_HOME=environment()["XDG_CACHE_HOME"])
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def output(folder: Path, job: int) -> str:
    """What a job has written; empty: nothing yet."""
    path = folder / f"slurm-{job}.out"
    return path.read_text() if path.exists() else ""


def trained(folder: Path, job: int) -> int:
    """The last step that was told in a job's output."""
    text = output(folder, job)
    steps = [line.split("/")[0].removeprefix("step ") for line in text.splitlines() if line.startswith("step ")]
    return int(steps[-1]) if steps else 0


def until_trained(folder: Path, job: int, step: int) -> None:
    wait_until(lambda: trained(folder, job) >= step, 400, f"step {step} of job {job}")


def until_requeued(slurm: Slurm, job: int, restarts: int = 1) -> None:
    """Slurm lets a requeued job wait for a while; here it need not."""
    deadline = time.monotonic() + 150
    while True:
        facts = slurm.facts(job)
        if facts["JobState"] == "PENDING" and facts["Restarts"] == str(restarts):
            break
        assert time.monotonic() < deadline, facts
        time.sleep(0.3)
    slurm.command("scontrol", "update", f"JobId={job}", "StartTime=now")


def assert_same_weights(folder: Path, job: int, undisturbed: dict[str, str]) -> None:
    assert weights_digest(folder / f"runs/slurm-{job}/checkpoints/step-{STEPS:06d}") == undisturbed


def test_the_script_is_one_that_sbatch_takes(slurm, folder):
    path = script(slurm, folder, *SETTINGS, "--partition", "cpu")
    done = slurm.run("sbatch", "--test-only", str(path), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


def test_sbatch_refuses_and_its_words_are_told(slurm, folder):
    done = slurm.run(LAUNCH, *SHAPE, "--partition", "gone", cwd=folder)
    assert done.returncode == 1
    assert "sbatch: exit code 1: sbatch: error: " in done.stderr
    assert "invalid partition" in done.stderr


@pytest.mark.timeout(1200)
def test_a_job_that_is_warned_saves_and_goes_on_by_itself(slurm, folder, undisturbed):
    launcher = start(slurm, folder, *SETTINGS)
    wait_until(lambda: "submitted" in (folder / "log").read_text(), 20)
    job = int((folder / "log").read_text().split()[1])
    until_trained(folder, job, 10)
    slurm.command("scancel", "--batch", "--signal=USR1", str(job))
    until_requeued(slurm, job)
    out = output(folder, job)
    assert f"job {job} is to be started again by Slurm: requeue 1 of 20" in out
    stopped_at = int(out.partition("made way after step ")[2].split(":")[0])
    assert launcher.wait(500) == 0
    log = (folder / "log").read_text()
    assert f"job {job}: COMPLETED, exit code 0" in log
    assert f"resuming from {folder}/runs/slurm-{job}/checkpoints/step-{stopped_at:06d}" in log
    assert_same_weights(folder, job, undisturbed)
    once_more = launch(folder, *SETTINGS, "--nproc-per-node", "2", "--run-id", f"slurm-{job}", "--resume", "auto")
    assert once_more.returncode == 0, once_more.stderr
    assert f"all {STEPS} steps are done already" in once_more.stdout
    assert_same_weights(folder, job, undisturbed)


@pytest.mark.timeout(1200)
def test_a_requeue_without_warning(slurm, folder, undisturbed):
    job = submit(slurm, folder, *SETTINGS)
    until_trained(folder, job, 20)
    slurm.command("scontrol", "requeue", str(job))
    until_requeued(slurm, job)
    assert slurm.until(job, "COMPLETED", "FAILED", timeout=500)["ExitCode"] == "0:0"
    assert "resuming from" in output(folder, job)
    assert_same_weights(folder, job, undisturbed)


@pytest.mark.timeout(1200)
def test_a_node_that_dies(slurm, folder, undisturbed):
    job = submit(slurm, folder, *SETTINGS, "--sbatch", "nodelist=node2,node3")
    until_trained(folder, job, 20)
    host = slurm.hosts[2]
    host.kill()
    until_requeued(slurm, job)
    host.boot()
    slurm.join(host)
    assert slurm.until(job, "COMPLETED", "FAILED", timeout=500)["ExitCode"] == "0:0"
    assert "resuming from" in output(folder, job)
    assert_same_weights(folder, job, undisturbed)


@pytest.mark.timeout(1200)
def test_an_agent_that_dies_leaves_the_others_time_to_save(slurm, folder, undisturbed):
    """srun could end them all for its sake; only what a survivor saves can be gone on with here."""
    more = ["--set", "checkpoint.every=0", "--max-restarts", "1"]
    job = submit(slurm, folder, *SETTINGS, *more, "--sbatch", "nodelist=node1,node2")
    until_trained(folder, job, 10)
    tasks = slurm.hosts[1].find("launcher.branch")
    (agent,) = [pid for pid in tasks if parent_of(pid) in tasks and parent_of(parent_of(pid)) in tasks]
    os.kill(agent, signal.SIGKILL)
    assert slurm.until(job, "COMPLETED", "FAILED", timeout=500)["ExitCode"] == "0:0", output(folder, job)
    assert "noticed: node2: " in output(folder, job)
    resumed = re.search(r"resuming from \S+/step-(\d+)\n", output(folder, job))
    assert resumed, output(folder, job)
    assert int(resumed[1]) >= 10
    assert_same_weights(folder, job, undisturbed)


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_the_time_limit_itself(slurm, folder):
    """Slurm's own signal, at some moment within half a minute of the one asked for."""
    more = ["--time", "2", "--set", "slurm.signal_s=70", "--set", "launch.stop_grace_s=30"]
    job = submit(slurm, folder, *SETTINGS, "--set", "loop.max_steps=500", *more)
    until_requeued(slurm, job)
    out = output(folder, job)
    assert "all ranks end after the step they are in, and save" in out
    stopped_at = int(out.partition("made way after step ")[2].split(":")[0])
    until_trained(folder, job, stopped_at + 10)
    slurm.command("scancel", str(job))
    assert f"step-{stopped_at:06d}\n" in output(folder, job).partition("resuming from")[2]


def test_a_cap_on_requeues(slurm, folder):
    (folder / "wait.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    job = submit(slurm, folder, "--set", "launch.max_requeues=0", "--nproc-per-node", "1", "--", "wait.py")
    wait_until(lambda: "up" in output(folder, job), 30)
    slurm.command("scancel", "--batch", "--signal=USR1", str(job))
    assert slurm.until(job, "COMPLETED", "FAILED", timeout=40)["ExitCode"] == "75:0"
    assert f"job {job} is not started again: 0 requeues were allowed" in output(folder, job)


def test_ctrl_c_cancels_the_job(slurm, folder):
    (folder / "wait.py").write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    launcher = start(slurm, folder, "--nproc-per-node", "1", "--", "wait.py")
    wait_until(lambda: "[rank 1] up" in (folder / "log").read_text(), 40)
    (pid,) = [p for p in slurm.hosts[0].find("--slurm", "wait.py") if p != launcher.pid]
    subprocess.run(["kill", "-INT", str(pid)], check=True)
    assert launcher.wait(40) == 128 + signal.SIGINT
    log = (folder / "log").read_text()
    job = int(log.split()[1])
    assert f"cancelling job {job}" in log
    assert slurm.state(job) == "CANCELLED"
    assert not [host.name for host in slurm.hosts if host.find("wait.py")]


@pytest.mark.timeout(1200)
def test_the_scripts_of_the_guide(slurm, folder):
    """docs/slurm.md's own words, as they stand."""
    page = (Path(__file__).parents[2] / "docs/slurm.md").read_text()
    script, commands = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    follow, render = commands.splitlines()
    env = {"PATH": f"{BIN}:{slurm.environment['PATH']}", "XDG_CACHE_HOME": environment()["XDG_CACHE_HOME"]}
    (folder / "guide.sh").write_text(script)
    done = slurm.run("sbatch", "--parsable", "guide.sh", cwd=folder, **env)
    assert done.returncode == 0, done.stderr
    job = int(done.stdout)
    facts = slurm.until(job, "COMPLETED", "FAILED", timeout=200)
    assert facts["ExitCode"] == "0:0", output(folder, job)
    assert slurm.run("bash", "-c", render, cwd=folder, **env).returncode == 0
    assert slurm.run("sbatch", "--test-only", "job.sh", cwd=folder, **env).returncode == 0
    followed = slurm.run(*shlex.split(follow), cwd=folder, timeout=250, **env)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "COMPLETED, exit code 0" in followed.stdout
