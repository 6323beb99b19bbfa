"""falcon-launch inside jobs of a real Slurm on four hosts: its nodes, its cpus, its ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import BIN, environment, launch, only_run, step_records, write_inputs

from cluster.hosts import Hosts
from cluster.machine import wait_until
from cluster.slurm import Slurm

LAUNCH = BIN / "falcon-launch"
TELL = """
import json, os, sys, time
facts = {k: os.environ[k] for k in ("RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")}
facts["cpus"] = sorted(os.sched_getaffinity(0))
facts["host"] = os.uname().nodename
facts["slurm"] = [name for name in os.environ if name.startswith("SLURM")]
print("fact " + json.dumps(facts), flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    with Hosts(4, folder / "c") as hosts, Slurm(hosts, folder / "slurm", cpus=(2, 2, 2, 2)) as four:
        yield four


def write_job(folder: Path, line: str, *options: str) -> Path:
    """A job script of one line, beside what it needs."""
    (folder / "tell.py").write_text(TELL)
    script = folder / "job.sh"
    head = [f"#SBATCH {option}" for option in ("--time=10", "--output=out-%A-%a", *options)]
    # Variables of this test run are not the job's business, but its cache is.
    cache = f"export XDG_CACHE_HOME={environment()['XDG_CACHE_HOME']}"
    script.write_text("\n".join(["#!/bin/bash", *head, cache, line, ""]))
    return script


def output_of(folder: Path, job: int, task: int | None = None) -> str:
    task = 4294967294 if task is None else task  # what %a is without an array
    return (folder / f"out-{job}-{task}").read_text()


def facts_in(text: str) -> list[dict]:
    lines = [line.partition("fact ")[2] for line in text.splitlines() if "fact " in line]
    return sorted((json.loads(line) for line in lines), key=lambda f: int(f["RANK"]))


def test_a_job_of_four_nodes_trains_the_rows_of_a_local_run(slurm, tmp_path):
    (tmp_path / "local").mkdir()
    recipe = write_inputs(tmp_path)
    line = f"exec {LAUNCH} --nproc-per-node 1 --backend gloo --recipe {recipe} --run-id job"
    script = write_job(tmp_path, line, "--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=2")
    job = slurm.submit(script)
    slurm.until(job, "COMPLETED", "FAILED", timeout=200)
    out = output_of(tmp_path, job)
    assert slurm.facts(job)["ExitCode"] == "0:0", out
    assert "outcome: ok, exit code 0, 4 ranks" in out
    report = json.loads((tmp_path / "runs/job/report.json").read_text())
    assert [rank["host"] for rank in report["ranks"]] == ["node1", "node2", "node3", "node4"]
    alone = launch(tmp_path / "local", "--nproc-per-node", "1", "--backend", "gloo", "--recipe", str(recipe))
    assert alone.returncode == 0, alone.stderr
    local, over_nodes = step_records(only_run(tmp_path / "local")), step_records(tmp_path / "runs/job")
    assert sorted(over_nodes) == sorted(local) == list(range(1, 9))
    for step, record in local.items():
        assert sorted(over_nodes[step]["rows"]) == sorted(record["rows"])
        assert over_nodes[step]["loss"] == pytest.approx(record["loss"], rel=0.01)


def test_two_jobs_at_once_keep_to_their_cpus(slurm, tmp_path):
    script = write_job(tmp_path, f"exec {LAUNCH} -- tell.py 6", "--nodes=4", "--ntasks-per-node=1")
    jobs = [slurm.submit(script), slurm.submit(script)]
    wait_until(lambda: all(slurm.state(job) == "RUNNING" for job in jobs), 20, "both jobs")
    for job in jobs:
        assert slurm.until(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", output_of(tmp_path, job)
    first, second = (facts_in(output_of(tmp_path, job)) for job in jobs)
    assert [one["host"] for one in first] == [one["host"] for one in second] == ["node1", "node2", "node3", "node4"]
    for one, other in zip(first, second, strict=True):
        assert len(one["cpus"]) == len(other["cpus"]) == 1
        assert one["cpus"] != other["cpus"]
    assert not first[0]["slurm"]  # ranks see nothing of Slurm that libraries could take for their own business


def test_uneven_nodes_give_all_they_have(slurm, tmp_path):
    line = f"exec {LAUNCH} --nproc-per-node auto -- tell.py 0"
    job = slurm.submit(write_job(tmp_path, line, "--ntasks=3", "--distribution=block"))
    assert slurm.until(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", output_of(tmp_path, job)
    told = facts_in(output_of(tmp_path, job))
    assert [(one["host"], one["cpus"]) for one in told] == [("node1", [0]), ("node1", [1]), ("node2", [0])]


def test_an_array_makes_a_run_of_each_task(slurm, tmp_path):
    line = f'exec {LAUNCH} --run-id "part-$SLURM_ARRAY_TASK_ID" -- tell.py 0'
    job = slurm.submit(write_job(tmp_path, line, "--nodes=2", "--ntasks-per-node=1", "--array=0-2"))
    for task in range(3):
        wait_until((tmp_path / f"runs/part-{task}/report.json").exists, 40, f"task {task}")
        wait_until(lambda task=task: "outcome: ok" in output_of(tmp_path, job, task), 10)
        told = facts_in(output_of(tmp_path, job, task))
        assert [one["WORLD_SIZE"] for one in told] == ["2", "2"]


def test_several_launchers_share_a_job(slurm, tmp_path):
    line = (
        f"{LAUNCH} --cores-list 0 -- tell.py 4 > one & {LAUNCH} --cores-list 1 -- tell.py 4 > two & wait -n && wait -n"
    )
    job = slurm.submit(write_job(tmp_path, line, "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2"))
    assert slurm.until(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", output_of(tmp_path, job)
    one, two = (facts_in((tmp_path / name).read_text()) for name in ("one", "two"))
    assert [fact["cpus"] for fact in one + two] == [[0], [0], [1], [1]]
    assert one[0]["MASTER_PORT"] != two[0]["MASTER_PORT"]
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_a_hostfile_is_a_filter(slurm, tmp_path):
    (tmp_path / "hosts").write_text("node2\nnode1\n")
    (tmp_path / "others").write_text("node1\nnode9\n")
    line = f"{LAUNCH} --hostfile others -- tell.py 0; echo code $?; exec {LAUNCH} --hostfile hosts -- tell.py 0"
    job = slurm.submit(write_job(tmp_path, line, "--nodes=3", "--ntasks-per-node=1"))
    assert slurm.until(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", output_of(tmp_path, job)
    out = output_of(tmp_path, job)
    assert f'others:2: not a node of job {job}: "node9"; its nodes are node1, node2, node3' in out
    assert "code 2" in out
    assert [one["host"] for one in facts_in(out)] == ["node2", "node1"]


def test_lost_cpus_are_told(slurm, tmp_path):
    """An exact step has one cpu a task, whatever the job asked for: srun 22.05 and later takes no number from it."""
    line = f"srun --exact --nodes=1 --ntasks=1 {LAUNCH} --hosts localhost -- tell.py 0; exec {LAUNCH} -- tell.py 0"
    job = slurm.submit(write_job(tmp_path, line, "--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=2"))
    assert slurm.until(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", output_of(tmp_path, job)
    out = output_of(tmp_path, job)
    assert "1 of the 2 cpus that the job has there can be used; --cpus-per-task was lost" in out
    lost, whole = facts_in(out)
    assert (len(lost["cpus"]), len(whole["cpus"])) == (1, 2)


def test_a_launcher_in_every_task_is_refused(slurm, tmp_path):
    job = slurm.submit(write_job(tmp_path, f"srun {LAUNCH} -- tell.py 0", "--nodes=2", "--ntasks-per-node=1"))
    slurm.until(job, "COMPLETED", "FAILED")
    assert slurm.facts(job)["ExitCode"] == "2:0"
    assert "srun starts this launcher 2 times" in output_of(tmp_path, job)


def test_a_rank_that_dies_ends_the_job_with_its_code(slurm, tmp_path):
    (tmp_path / "bad.py").write_text(
        "import os, sys, time\nos.environ['RANK'] == '2' and sys.exit(7)\ntime.sleep(60)\n"
    )
    job = slurm.submit(write_job(tmp_path, f"exec {LAUNCH} -- bad.py", "--nodes=4", "--ntasks-per-node=1"))
    facts = slurm.until(job, "COMPLETED", "FAILED", timeout=40)
    assert facts["ExitCode"] == "7:0"
    assert "rank 2" in output_of(tmp_path, job)
    assert not [host.name for host in slurm.hosts if host.find("bad.py")]


def test_long_lines_of_many_ranks_arrive_whole(slurm, tmp_path):
    """srun cuts and mixes lines; a plan, a topology or a rank's own long line must not suffer."""
    (tmp_path / "long.py").write_text(
        "import os\nfor n in range(300): print('long', os.environ['RANK'], n, 'x' * 3000, 'end')\n"
    )
    job = slurm.submit(write_job(tmp_path, f"exec {LAUNCH} -- long.py", "--nodes=4", "--ntasks-per-node=1"))
    assert slurm.until(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", output_of(tmp_path, job)
    lines = [line for line in output_of(tmp_path, job).splitlines() if " long " in f" {line}"]
    whole = [line for line in lines if line.endswith(f"{'x' * 3000} end")]
    assert len(lines) == len(whole) == 1200


def test_without_srun_it_says_what_to_do(tmp_path):
    environ = {**environment(), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "PATH": "/nowhere"}
    done = launch(tmp_path, "--dry-run", env=environ)
    assert done.returncode == 1
    assert 'cannot start "srun": No such file or directory; put it on PATH, or use --hosts localhost' in done.stderr
