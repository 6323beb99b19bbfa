"""The demo itself, as a job over four nodes of a real Slurm: minutes of training, told by its own report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import BIN, environment, launch, only_run, step_records

from cluster.hosts import Hosts
from cluster.slurm import Slurm

STEPS = 25
SCRIPT = """#!/bin/bash
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=60
#SBATCH --output=out-%j
export XDG_CACHE_HOME={cache}
exec {launch} --run-id demo --hostfile {hostfile}
"""
HOSTFILE = """
node1 cores=0
node2 cores=0
node3 cores=1
node4 cores=1
"""
"""The four share the cores of one machine: ranks of one thread each, two to a core."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_demo_over_four_nodes(tmp_path: Path):
    """It ends well, learns, and takes the rows of a local run in every step."""
    script = tmp_path / "job.sh"
    hostfile = tmp_path / "hosts"
    hostfile.write_text(HOSTFILE)
    cache = environment()["XDG_CACHE_HOME"]
    script.write_text(SCRIPT.format(cache=cache, launch=BIN / "falcon-launch", hostfile=hostfile))
    with Hosts(4, tmp_path / "c") as hosts, Slurm(hosts, tmp_path / "slurm", cpus=(2, 2, 2, 2)) as slurm:
        job = slurm.submit(script)
        facts = slurm.until(job, "COMPLETED", "FAILED", timeout=2400)
    out = (tmp_path / f"out-{job}").read_text()
    assert facts["ExitCode"] == "0:0", out
    assert "outcome: ok, exit code 0, 4 ranks" in out
    run = tmp_path / "runs/demo"
    summary = json.loads((run / "attempt_1/rank_0000/result.json").read_text())["summary"]
    base, tuned = (summary[name]["held_out"]["perplexity"] for name in ("base", "tuned"))
    assert tuned <= 0.9 * base
    (tmp_path / "local").mkdir()
    shorter = ["--set", "evaluate.base=false", "--set", "loop.max_steps=5"]
    alone = launch(tmp_path / "local", "--nproc-per-node", "2", *shorter, timeout=1200)
    assert alone.returncode == 0, alone.stderr
    local, over_nodes = step_records(only_run(tmp_path / "local")), step_records(run)
    assert (sorted(local), sorted(over_nodes)) == (list(range(1, 6)), list(range(1, STEPS + 1)))
    for step, record in local.items():
        assert sorted(over_nodes[step]["rows"]) == sorted(record["rows"])
