"""Job scripts: what they ask Slurm for, what the launcher inside is told, and what must not stand in them."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
from test_launcher_yield import load, make_run

from launcher import batch, config, flags, slurmjob
from launcher.config import Flags
from launcher.errors import UserError
from launcher.slurm import JobState

GOLDEN = """#!/bin/bash
#SBATCH --job-name=falcon
#SBATCH --nodes=2-4
#SBATCH --ntasks-per-node=2
#SBATCH --cpus-per-task=28
#SBATCH --partition=cpu
#SBATCH --time=2:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --constraint=amx
# In place of this shell, so that Slurm's signals arrive: 120 s before the time is over the launcher
# has all ranks save, asks Slurm to start the job again, and then goes on where it was.
exec /opt/bin/falcon-launch --nnodes 2:4 --nproc-per-node 2 --recipe demo --set 'data.name=my data.jsonl' \
--resume auto --run-id "slurm-$SLURM_JOB_ID"
"""


def script(*words: str) -> str:
    order = flags.parse(["--slurm", *words])
    loaded = config.load(order.flags)
    return slurmjob.render(loaded, "/opt/bin/falcon-launch", order.job_words, order.program_words).text


def test_the_script_of_a_job():
    shape = ("--nnodes", "2:4", "--nproc-per-node", "2", "--cpus_per_task=28", "--partition", "cpu", "--time=2:00:00")
    assert (
        script(*shape, "--recipe", "demo", "--sbatch", "constraint=amx", "--set", "data.name=my data.jsonl") == GOLDEN
    )


def test_whole_nodes_where_no_cpus_are_named():
    lines = script("--nnodes", "4").splitlines()
    assert "#SBATCH --exclusive" in lines
    assert "#SBATCH --nodes=4" in lines
    assert not [line for line in lines if "ntasks" in line]  # so that the launcher counts NUMA nodes


def test_a_run_with_a_name_and_a_program():
    last = script("--run-id", "x y".replace(" ", "-"), "--", "my script.py", "--time", "3").splitlines()[-1]
    assert last == "exec /opt/bin/falcon-launch --run-id x-y --resume auto -- 'my script.py' --time 3"


@pytest.mark.parametrize("program", ["train.py --x 1", "-- train.py --resume last.pt", "-m mod --resume=last.pt"])
def test_a_program_keeps_its_own_arguments(program):
    line = script("--nnodes", "2", *program.split()).splitlines()[-1]
    assert line == f'exec /opt/bin/falcon-launch --nnodes 2 --resume auto --run-id "slurm-$SLURM_JOB_ID" {program}'


def test_a_name_of_the_recipe_is_kept(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[launch]\nrun_id = 'mine'\n")
    last = script("--recipe", str(recipe)).splitlines()[-1]
    assert last == f"exec /opt/bin/falcon-launch --recipe {recipe} --resume auto"


def test_a_run_that_is_gone_on_with(tmp_path):
    folder = make_run(tmp_path, "mine", checkpoint=True)
    assert script("--resume", str(folder)).splitlines()[-1] == f"exec /opt/bin/falcon-launch --resume {folder}"


def in_the_job(text: str) -> config.LaunchConfig:
    """What the launcher that a script starts is asked for."""
    words = shlex.split(text.splitlines()[-1].replace("$SLURM_JOB_ID", "7"))[2:]
    return config.load(flags.parse(words).flags)


@pytest.mark.parametrize(
    ("words", "nodes", "launch"),
    [(["--nnodes", "2:4"], "2-4", (4, 2)), (["--num-nodes=2"], "2", (2, None)), ([], "4", (4, None))],
)
def test_a_job_wants_the_nodes_that_it_asks_slurm_for(tmp_path, words, nodes, launch):
    recipe = tmp_path / "r.toml"
    recipe.write_text("[launch]\nnnodes = 4\n")
    text = script("--recipe", str(recipe), *words)
    assert f"#SBATCH --nodes={nodes}\n" in text
    found = in_the_job(text).launch
    assert (found.nnodes, found.min_nodes) == launch


def saved_run(runs: Path, **launch) -> Path:
    folder = make_run(runs, "mine", checkpoint=True)
    saved = config.LaunchConfig(launch=config.LaunchSettings(**launch))
    (folder / "config.json").write_text(json.dumps(saved.to_json()))
    return folder


def test_a_run_that_had_hosts_of_its_own_goes_on_in_a_job(tmp_path):
    folder = saved_run(tmp_path, hostfile="gone", include="node7", nnodes=2)
    text = script("--resume", str(folder))
    words = f"--resume {folder} --nnodes 2 --set launch.hostfile=none --set launch.include=none"
    assert text.splitlines()[-1].endswith(words)
    found = in_the_job(text)
    assert (found.launch.hostfile, found.launch.include, found.launch.nnodes) == (None, None, 2)
    assert found.resume_from == str(folder)
    with pytest.raises(UserError, match="--hosts: not beside --slurm"):
        script("--resume", str(folder), "--hosts", "a")
    outside = load("--resume", str(folder)).launch
    assert (outside.hostfile, outside.nnodes) == ("gone", 2)


def test_a_run_of_a_job_goes_on_in_another_and_elsewhere(tmp_path):
    folder = saved_run(tmp_path, nnodes=4, min_nodes=2)
    text = script("--resume", str(folder))
    assert "#SBATCH --nodes=2-4\n" in text
    inside, outside = in_the_job(text).launch, load("--resume", str(folder)).launch
    assert (inside.nnodes, inside.min_nodes) == (4, 2)
    assert (outside.nnodes, outside.min_nodes) == (None, None)  # its nodes are not there any more


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--min-nodes", "2"], '--min-nodes: of how many a job is to have: "2"; add --nnodes N'),
        (["--nnodes", "1", "--min-nodes", "2"], '--min-nodes: launch.min_nodes is more than the hosts, 1: "2"'),
        (["--hosts", "a,b"], '--hosts: not beside --slurm, where Slurm chooses the nodes: "a,b"'),
        (["--env", "HF_TOKEN=abc"], '--env: a job script is no place for a secret: "HF_TOKEN"'),
        (
            ["--set", "slurm.signal_s=60"],
            "slurm.signal_s: no longer than launch.stop_grace_s, in which",
        ),
        (["--sbatch", "nodes=3"], '--sbatch: not an option that can be given so: "nodes=3"'),
        (["--sbatch", "x\n#SBATCH --y"], "--sbatch: not an option"),
        (["--partition", "a b"], '--partition: slurm.partition must be one word: "a b"'),
        (["--set", "slurm.cpus_per_task=0"], '--set: slurm.cpus_per_task must be 1 or more: "0"'),
        (["--set", "slurm.partion=x"], "slurm.partition"),
    ],
)
def test_jobs_that_cannot_be(words, said):
    with pytest.raises(UserError) as fault:
        script(*words)
    assert said in str(fault.value)


def test_what_stays_out_of_the_script_is_no_secret_in_it(tmp_path):
    secrets = tmp_path / "secrets.env"
    secrets.write_text("HF_TOKEN=abc\nHTTPS_PROXY=http://me:pw@proxy\n")
    text = script(
        "--env-file",
        str(secrets),
        "--env",
        "HF_TOKEN",
        "--env",
        "A=b",
        "--sbatch",
        "export=HF_TOKEN",
        "--",
        "t.py",
        "--tokenizer=x",
    )
    assert f"--env-file {secrets} --env HF_TOKEN --env A=b" in text
    assert "abc" not in text


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["--env", "HTTPS_PROXY=http://me:t0ps3cret@proxy"], '--env: a job script is no place for a secret: "HTTPS_'),
        (["--env=HTTPS_PROXY=http://me:t0ps3cret@proxy"], '--env: a job script is no place for a secret: "HTTPS_'),
        (["--set", "launch.env=['MY_KEY=t0ps3cret']"], '--env: a job script is no place for a secret: "MY_KEY"'),
        (["--set", "data.name=https://me:t0ps3cret@x/y"], 'a login: "data.name=https://<redacted>@x/y"'),
        (["--", "t.py", "https://me:t0ps3cret@x/y"], 'a login: "https://<redacted>@x/y"'),
        (["--sbatch", "export=ALL,HF_TOKEN=t0ps3cret"], '--env: a job script is no place for a secret: "HF_TOKEN"'),
        (["--sbatch", "comment=https://me:t0ps3cret@x"], 'a login: "comment=https://<redacted>@x"'),
    ],
)
def test_a_secret_that_would_stand_in_the_script(words, place):
    with pytest.raises(UserError) as fault:
        script(*words)
    assert place in str(fault.value)
    assert "t0ps3cret" not in str(fault.value)


def test_options_of_a_job_need_a_job():
    with pytest.raises(UserError, match='--partition: is for the job that --slurm submits: "cpu"; add --slurm'):
        flags.parse(["--partition", "cpu"])


TOLD = "JobId=7 JobName=falcon JobState={} Reason={} Requeue={} ExitCode={} NodeList=node[1-2] StdOut=/a/b.out"


@pytest.mark.parametrize(
    ("state", "requeue", "told", "final", "code"),
    [
        ("RUNNING", 1, "0:0", False, 0),
        ("PENDING", 1, "0:0", False, 0),
        ("COMPLETED", 1, "0:0", True, 0),
        ("FAILED", 1, "7:0", True, 7),
        ("CANCELLED", 1, "0:15", True, 143),
        ("TIMEOUT", 1, "0:0", True, 1),
        ("NODE_FAIL", 1, "0:0", False, 1),
        ("NODE_FAIL", 0, "0:0", True, 1),
    ],
)
def test_how_a_job_stands(state, requeue, told, final, code):
    found = JobState.parse(TOLD.format(state, "None", requeue, told))
    assert (found.name, found.is_final, found.exit_code) == (state, final, code)
    assert (found.nodes, found.reason, found.output) == ("node[1-2]", "", "/a/b.out")


def test_no_job_at_all():
    with pytest.raises(UserError, match="scontrol: tells of no job"):
        JobState.parse("slurm_load_jobs error\n")


def test_a_run_of_flags_alone_is_as_before():
    assert config.load(Flags()).slurm.options == ()


SCONTROL = """#!{python}
import pathlib, sys
file = pathlib.Path({states!r})
first, *rest = file.read_text().split()
file.write_text(" ".join(rest or [first]))
print("JobId=7 JobName=falcon JobState=" + first + " Requeue=0 ExitCode=" + ("0:0" if first == "COMPLETED" else "1:0"))
"""


@pytest.mark.parametrize(
    ("states", "code", "looks"),
    [
        ("RUNNING COMPLETED", 0, 3),
        ("RUNNING FAILED FAILED FAILED RUNNING COMPLETED", 0, 7),  # on its way to be started again
        ("RUNNING FAILED", 1, 6),
    ],
)
def test_a_job_that_seems_to_have_failed_is_looked_at_for_a_while(tmp_path, monkeypatch, states, code, looks):
    (tmp_path / "states").write_text(states)
    program = tmp_path / "scontrol"
    program.write_text(SCONTROL.format(python=sys.executable, states=str(tmp_path / "states")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(batch, "POLL_S", 0.01)
    asked, said = [], []
    client = batch._client
    monkeypatch.setattr(batch, "_client", lambda *words: asked.append(words) or client(*words))
    assert batch.Follower("7", said.append).until_done() == code
    assert (len(asked), said[-1]) == (looks, f"job 7: {states.split()[-1]}, exit code {code}")
