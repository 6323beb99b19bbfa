"""The main job over three hosts that share nothing: data and model are on the first one only."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from launching import BIN, environment, launch, only_run, step_records, write_inputs

from cluster.hosts import Hosts


def own_cache(hosts: Hosts) -> dict[str, str]:
    """A cache on each host's own disk."""
    return {**os.environ, "XDG_CACHE_HOME": str(hosts.disk / "cache")}


@pytest.fixture(scope="module")
def trained(hosts: Hosts):
    """One run over the three hosts, each with its own disk, on which only the compiled backend is from before."""
    home = hosts[0].disk / "home"
    home.mkdir()
    built = Path(environment()["XDG_CACHE_HOME"], "falcon-dist/ccl")
    for host in hosts:
        shutil.copytree(built, host.disk / "cache/falcon-dist/ccl")
    write_inputs(home)
    recipe = home / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(home), str(hosts.disk / "home")).replace("= 4\n", "= 6\n", 1))
    words = ["--hosts", "node[1-3]", "--nproc-per-node", "1", "--recipe", "recipe.toml", "--run-id", "apart"]
    done = hosts[0].run(
        *map(str, (BIN / "falcon-launch", *words)), cwd=hosts.disk / "home", env=own_cache(hosts), timeout=290
    )
    return hosts, done


def test_it_ends_well(trained):
    hosts, done = trained
    assert done.returncode == 0, done.stdout + done.stderr
    assert "outcome: ok, exit code 0, 3 ranks" in done.stdout
    for host in hosts.hosts[1:]:
        received = list((host.disk / "cache/falcon-dist/received").iterdir())
        assert len(received) == 2  # model and rows
        assert not list((host.disk / "home").rglob("recipe.toml"))


def test_rows_of_each_step_are_those_of_a_local_run(trained, tmp_path):
    hosts, _ = trained
    recipe = write_inputs(tmp_path)
    recipe.write_text(recipe.read_text().replace("= 4\n", "= 6\n", 1))
    alone = launch(tmp_path, "--nproc-per-node", "1", "--recipe", str(recipe))
    assert alone.returncode == 0, alone.stderr
    local = step_records(only_run(tmp_path))
    over_hosts = step_records(hosts[0].disk / "home/runs/apart")
    assert sorted(over_hosts) == sorted(local) == list(range(1, 9))
    for step, record in local.items():
        assert sorted(over_hosts[step]["rows"]) == sorted(record["rows"])
        assert over_hosts[step]["loss"] == pytest.approx(record["loss"], rel=0.01)


def test_the_launchers_folder_has_every_ranks_logs(trained):
    hosts, _ = trained
    run = hosts[0].disk / "home/runs/apart"
    for rank in range(3):
        names = {path.name for path in (run / f"attempt_1/rank_{rank:04d}").iterdir()}
        assert {"steps.jsonl", "result.json"} <= names
    report = json.loads((run / "report.json").read_text())
    assert [rank["host"] for rank in report["ranks"]] == ["node1", "node2", "node3"]


def test_a_second_run_sends_nothing_again(trained):
    hosts, _ = trained
    before = {p: p.stat().st_ctime_ns for p in hosts[1].disk.rglob("received/*/*")}
    words = ["--hosts", "node[1-2]", "--nproc-per-node", "1", "--recipe", "recipe.toml", "--set", "loop.max_steps=1"]
    done = hosts[0].run(
        *map(str, (BIN / "falcon-launch", *words)), cwd=hosts.disk / "home", env=own_cache(hosts), timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "received" not in done.stdout
    assert {p: p.stat().st_ctime_ns for p in hosts[1].disk.rglob("received/*/*")} == before


def test_a_run_is_resumed_although_only_the_first_host_has_its_checkpoint(trained):
    hosts, _ = trained
    assert not list(hosts[1].disk.rglob("step-*"))
    words = [str(BIN / "falcon-launch"), "--resume", "apart"]
    done = hosts[0].run(*words, cwd=hosts.disk / "home", env=own_cache(hosts), timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 8 steps are done already" in done.stdout
    for host in hosts.hosts[1:]:
        assert (host.disk / "home/runs/apart/checkpoints/step-000008/manifest.json").is_file()
