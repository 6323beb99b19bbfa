"""The image and compose.yaml of docker/, built and run for real: two containers that train over ssh."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import launch, only_run, step_records, write_inputs

from containers.pods import DEBIAN, Pods

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "containers"
COMPOSE = [str(Path(sys.executable).parent / "podman-compose"), "-f", "docker/compose.yaml"]
pytestmark = pytest.mark.timeout(1500)  # the first build takes minutes
FILES = ("constraints.txt", "pyproject.toml", "README.md", "LICENSE", ".dockerignore")
FOLDERS = ("launcher", "falcon_dist", "docker")


@pytest.fixture(scope="module")
def pods() -> Iterator[Pods]:
    with Pods(CACHE / "podman") as own:
        own.make_debian(CACHE / "debian.tar")
        yield own


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a build sees it, with all wheels in docker/wheels."""
    folder = tmp_path_factory.mktemp("context")
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name)
    wheels = CACHE / "wheels"
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels), "-c", "constraints.txt"]
    subprocess.run([*words, "torch", "setuptools>=77", "."], cwd=ROOT, check=True)
    for wheel in wheels.glob("*.whl"):
        if not wheel.name.startswith("falcon_dist"):
            shutil.copy(wheel, folder / "docker/wheels" / wheel.name)
    return folder


@pytest.fixture(scope="module")
def image(pods: Pods, context: Path) -> str:
    arguments = ["--build-arg", f"BASE={DEBIAN}", "--build-arg", "PIP_NO_INDEX=1"]
    words = [*arguments, "-f", "docker/Dockerfile", "--target", "node", "-t", "falcon-node"]
    done = pods.build(*words, str(context))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return "falcon-node"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """What is mounted as /data."""
    write_inputs(tmp_path)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(tmp_path), "/data"))
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, 1000, 1000)
    return tmp_path


def test_the_dockerfile_is_without_faults():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "docker/Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_understands_the_file(pods):
    done = pods.run(*COMPOSE, "config", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert {"node1", "node2", "train"} <= set(re.findall(r"^  (\w+):", done.stdout, re.MULTILINE))


def test_the_image_is_small_and_runs_as_a_user_of_its_own(pods, image):
    told = json.loads(pods.run("podman", "image", "inspect", image).stdout)[0]
    assert told["Size"] < 1.9e9
    assert told["Config"]["User"] == "1000"
    done = pods.run("podman", "run", "--rm", "--network=none", "--entrypoint", "falcon-launch", image, "--version")
    assert done.stdout.startswith("falcon-launch "), done.stderr
    done = pods.run("podman", "run", "--rm", "--network=none", "--entrypoint", "find", image, "/ssh", "/etc/ssh")
    assert "id" not in [Path(line).name for line in done.stdout.split()]
    assert "ssh_host" not in done.stdout  # keys are made at the start, none is in the image


def test_limits_of_a_container_are_honoured(pods, image):
    plan = ["--entrypoint", "falcon-launch", image, "--hosts", "localhost", "--dry-run", "--json"]
    one = pods.run("podman", "run", "--rm", "--network=none", "--cpuset-cpus=1", *plan)
    assert [rank["cpus"] for rank in json.loads(one.stdout)["nodes"][0]["ranks"]] == ["1"], one.stderr
    half = pods.run("podman", "run", "--rm", "--network=none", "--cpus=1", *plan)
    (rank,) = json.loads(half.stdout)["nodes"][0]["ranks"]
    assert rank["threads"] == 1, half.stderr


@pytest.mark.timeout(500)
def test_two_containers_train_over_ssh(pods, image, work, tmp_path):
    environ = {**pods.environment, "WORK": str(work)}
    try:
        words = ["run", "--rm", "-T", "train", "--recipe", "recipe.toml", "--run-id", "contained"]
        done = pods.run(*COMPOSE, *words, cwd=ROOT, env=environ, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "outcome: ok, exit code 0, 2 ranks" in done.stdout
        shm = pods.run("podman", "exec", "falcon_node1_1", "df", "--output=size", "/dev/shm")
        assert int(shm.stdout.split()[-1]) == 64_000  # Docker's own size is enough
    finally:
        pods.run(*COMPOSE, "down", "--volumes", "--timeout", "0", cwd=ROOT, env=environ)
    report = json.loads((work / "runs/contained/report.json").read_text())
    assert [(rank["host"], rank["planned_cpus"]) for rank in report["ranks"]] == [("node1", "0"), ("node2", "1")]
    local = tmp_path / "local"
    local.mkdir()
    recipe = write_inputs(local)
    alone = launch(local, "--nproc-per-node", "1", "--backend", "gloo", "--recipe", str(recipe))
    assert alone.returncode == 0, alone.stderr
    of_one, of_two = step_records(only_run(local)), step_records(work / "runs/contained")
    assert {step: sorted(told["rows"]) for step, told in of_two.items()} == {
        step: sorted(told["rows"]) for step, told in of_one.items()
    }
