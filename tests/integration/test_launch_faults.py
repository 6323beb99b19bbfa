"""Ranks, agents and launchers that die: who is named, which exit code, and that nothing is left running."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import write_inputs

LAUNCH = str(Path(sys.executable).parent / "falcon-launch")
pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cpus")

SLEEP = """
import os, subprocess, sys, time
helper = subprocess.Popen(["sleep", "300"])
with open("pids", "a") as f:
    f.write(f"{os.getpid()} {helper.pid} {os.getppid()}\\n")
if "deaf" in sys.argv:
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(300)
"""
FAIL = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    for n in range(30):
        print("line", n, file=sys.stderr)
    time.sleep(0.2)
    if sys.argv[1] == "SIGKILL":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(sys.argv[1]))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(300)
"""


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, timeout=10.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.02)


class Sleeping:
    """A launcher whose two ranks sleep, each with a helper process."""

    def __init__(self, folder, *args):
        (folder / "sleep.py").write_text(SLEEP)
        words = [LAUNCH, "--nproc-per-node", "2", "--", "sleep.py", *args]
        self.process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        pids = folder / "pids"
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 6)
        rows = [list(map(int, line.split())) for line in pids.read_text().splitlines()]
        self.agent = rows[0][2]
        self.pids = [self.agent, *(pid for row in rows for pid in row[:2])]

    def end(self, timeout=10.0):
        out, err = self.process.communicate(timeout=timeout)
        wait_until(lambda: not any(map(is_alive, self.pids)))
        return self.process.returncode, out, err


@pytest.mark.parametrize(("how", "code", "named"), [("3", 3, "exit code 3"), ("SIGKILL", 137, "SIGKILL")])
def test_the_first_failure_is_named_and_stops_the_rest(tmp_path, how, code, named):
    (tmp_path / "fail.py").write_text(FAIL)
    words = [LAUNCH, "--nproc-per-node", "2", "--", "fail.py", how]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    (report,) = tmp_path.glob("runs/*/report.json")
    assert json.loads(report.read_text())["timings_s"]["stop"] < 5.5  # the 5 s that a deaf rank gets
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert lines[0] == f"rank 1 (local_rank 1, host localhost) failed first: {named}"
    assert lines[1:16] == [f"  line {n}" for n in range(15, 30)]
    assert lines[16].endswith("attempt_1/rank_0001/stderr")
    assert lines[17] == "other ranks: 1 SIGKILL"
    assert Path(lines[16].removeprefix("  log: ")).read_text().startswith("line 0\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_leaves_nothing(tmp_path, number):
    run = Sleeping(tmp_path)
    run.process.send_signal(number)
    code, _, err = run.end(timeout=3)
    assert code == 128 + number
    assert f"interrupted by {number.name}" in err


def test_a_second_signal_kills_at_once(tmp_path):
    run = Sleeping(tmp_path, "deaf")
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGINT)
    assert run.end(timeout=2)[0] == 130


def test_ranks_deaf_to_a_signal_are_killed_after_the_grace(tmp_path):
    run = Sleeping(tmp_path, "deaf")
    run.process.send_signal(signal.SIGTERM)
    assert run.end(timeout=7)[0] == 143


@pytest.mark.parametrize(
    ("number", "why"), [(signal.SIGTERM, "it was interrupted"), (signal.SIGUSR1, "it was asked to make way")]
)
def test_a_run_that_fails_and_is_then_interrupted_is_not_started_again(tmp_path, number, why):
    (tmp_path / "fail.py").write_text(FAIL)
    words = [LAUNCH, "--nproc-per-node", "2", "--max-restarts", "3", "--", "fail.py", "7"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert any(line.startswith("noticed: ") for line in process.stdout)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err.splitlines()[-1]) == (7, f"not started again: {why}")
    assert len(list(tmp_path.glob("runs/*/attempt_*"))) == 1


def test_a_killed_launcher_leaves_nothing(tmp_path):
    run = Sleeping(tmp_path)
    run.process.kill()
    assert run.end(timeout=3)[0] == -signal.SIGKILL


def test_a_killed_agent_leaves_nothing_and_is_named(tmp_path):
    run = Sleeping(tmp_path)
    os.kill(run.agent, signal.SIGKILL)
    code, out, err = run.end(timeout=5)
    assert code == 1
    assert "localhost: the agent is gone: SIGKILL" in err
    assert "outcome: failed" in out


def test_a_killed_helper_of_a_rank_is_not_the_launchers_business(tmp_path):
    run = Sleeping(tmp_path)
    os.kill(run.pids[2], signal.SIGKILL)
    time.sleep(0.3)
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    run.end()


def test_a_rank_elsewhere_than_planned_stops_the_run(tmp_path):
    saying = 'import os, time\nos.write(10, b\'{"event": "bound", "cpus": "99", "threads": 1}\\n\')\ntime.sleep(300)\n'
    (tmp_path / "liar.py").write_text(saying)
    words = [LAUNCH, "--nproc-per-node", "2", "--", "liar.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert 'is not bound as planned: planned cpus "' in done.stderr


def test_cpus_that_are_not_there_are_refused(tmp_path):
    core = {"core": 0, "cpus": "4000"}
    nodes = [{"numa_node": 0, "memory_bytes": None, "cores": [core]}]
    machine = {"sockets": [{"socket": 0, "numa_nodes": nodes}], "allowed": "4000", "mems_allowed": ""}
    (tmp_path / "odd.json").write_text(json.dumps({**machine, "quota_cpus": None}))
    (tmp_path / "x.py").write_text("")
    words = [LAUNCH, "--topology", "odd.json", "--", "x.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, 'cannot bind to cpus "4000"' in done.stderr) == (1, True)


def test_a_failed_preparation_starts_no_rank(tmp_path):
    words = [LAUNCH, "--nproc-per-node", "2", "--set", "data.name=./missing.jsonl"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("preparing failed: exit code 2\n")
    (run,) = (tmp_path / "runs").iterdir()
    assert not list(run.glob("attempt_1/rank_*"))


def test_a_preparation_that_stands_still_ends(tmp_path):
    recipe = write_inputs(tmp_path)
    words = [LAUNCH, "--recipe", str(recipe), "--nproc-per-node", "1", "--set", "launch.hang_s=1"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: preparing(tmp_path), 30)
    (pid,) = preparing(tmp_path)
    os.kill(pid, signal.SIGSTOP)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, is_alive(pid)) == (1, False)
    assert re.match(r"nothing was said and no processor time used for 1\d s while hosts prepare\n", err)


def preparing(folder: Path) -> list[int]:
    """The processes that prepare a run in this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"falcon_dist" in words and b"prepare" in words and str(folder).encode() in b" ".join(words):
                found.append(int(path.parent.name))
    return found


def test_a_crash_is_shown_with_the_stack_it_came_in(tmp_path):
    (tmp_path / "crash.py").write_text("import ctypes\ndef touch():\n    ctypes.string_at(0)\ntouch()\n")
    words = [LAUNCH, "--nproc-per-node", "2", "--", "crash.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "failed first: SIGSEGV" in done.stderr) == (139, True)
    assert "  Fatal Python error: Segmentation fault" in done.stderr
    assert "line 3 in touch" in done.stderr


def test_a_run_folder_that_is_gone_is_told_in_a_line(tmp_path):
    running = Sleeping(tmp_path)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    os.kill(running.pids[1], signal.SIGKILL)
    code, _, err = running.end()
    assert code == 1
    cause, *_, told = err.splitlines()
    assert cause.endswith("failed first: SIGKILL")
    assert told.startswith('falcon-launch: the report cannot be written to "')
    assert told.endswith("No such file or directory; is the run folder gone?")
