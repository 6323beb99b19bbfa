"""``falcon ps`` and ``falcon kill``: from here, from elsewhere, and while no attempt runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import roster, running
from launcher.errors import UserError

BIN = Path(sys.executable).parent
LAUNCH, FALCON = str(BIN / "falcon-launch"), str(BIN / "falcon")
WORDS = (LAUNCH, "--nproc-per-node", "1", "--run-id", "one", "--max-restarts", "5", "--", "program.py")
FAIL = "import sys\nsys.exit(7)\n"
SLEEP = "import time\nprint('ready', flush=True)\ntime.sleep(300)\n"
RUN = "runs/one"


def start(folder: Path, code: str, word: str) -> subprocess.Popen:
    """A launcher that has said ``word``."""
    (folder / "program.py").write_text(code)
    process = subprocess.Popen(WORDS, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert any(word in line for line in process.stdout)
    return process


def falcon(folder: Path, *words: str) -> tuple[int, str]:
    done = subprocess.run([FALCON, *words], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout


def attempts(folder: Path) -> int:
    return len(list((folder / RUN).glob("attempt_*")))


def outcome(folder: Path) -> tuple[str, int]:
    report = json.loads((folder / RUN / "report.json").read_text())
    return report["outcome"], report["exit_code"]


def test_a_run_that_waits_for_its_next_attempt_is_listed_and_can_be_ended(tmp_path):
    process = start(tmp_path, FAIL, "restart 3 of 5 in 4 s")
    assert falcon(tmp_path, "ps")[1].splitlines()[1].startswith("one ")
    told = falcon(tmp_path, "report", "one")[1].splitlines()
    assert told[0] == "this run has not ended (running); its newest attempt that has:"
    assert falcon(tmp_path, "kill", "one")[0] == 0
    _, err = process.communicate(timeout=10)
    assert (process.returncode, attempts(tmp_path), outcome(tmp_path)) == (143, 3, ("interrupted", 143))
    assert err.splitlines()[-1] == "not started again: SIGTERM came before the next attempt"
    assert falcon(tmp_path, "ps")[1] == "nothing runs\n"
    assert "has not ended" not in falcon(tmp_path, "report", "one")[1]


@pytest.mark.parametrize(
    ("number", "ended"), [(signal.SIGUSR1, ("stopped", 75)), (signal.SIGINT, ("interrupted", 130))]
)
def test_a_signal_between_two_attempts_ends_the_run_in_good_order(tmp_path, number, ended):
    process = start(tmp_path, FAIL, "restart 2 of 5 in 2 s")
    process.send_signal(number)
    out, _ = process.communicate(timeout=10)
    assert (process.returncode, outcome(tmp_path)) == (ended[1], ended)
    assert f"outcome: {ended[0]}" in out


def test_a_run_whose_agent_was_ended_from_elsewhere_is_not_started_again(tmp_path):
    process = start(tmp_path, SLEEP, "ready")
    assert roster.end(str(tmp_path / RUN / "attempt_1/agent_0000.json")) == "ended"
    _, err = process.communicate(timeout=10)
    assert (process.returncode, attempts(tmp_path), outcome(tmp_path)) == (143, 1, ("interrupted", 143))
    assert "interrupted by SIGTERM" in err


def test_an_agent_whose_keeper_died_was_not_ended_by_anybody(tmp_path):
    process = start(tmp_path, SLEEP, "ready")
    agent = json.loads((tmp_path / RUN / "attempt_1/agent_0000.json").read_text())["pid"]
    keeper = int(Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(keeper, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while attempts(tmp_path) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=15)
    assert process.returncode == 143


def test_what_runs_on_another_host_alone_is_not_said_to_be_gone(tmp_path):
    process = start(tmp_path, SLEEP, "ready")
    for name in ("running.json", "attempt_1/agent_0000.json"):  # as if this host only shared the folder
        path = tmp_path / RUN / name
        path.write_text(path.read_text().replace(roster.Process.this().hostname, "elsewhere"))
    code, out = falcon(tmp_path, "kill", "one")
    assert code == 1
    assert out.splitlines() == [
        "localhost: could not be ended from here: it is on elsewhere; run falcon kill there",
        "elsewhere: the launcher could not be ended from here; run falcon kill there",
    ]
    assert process.poll() is None
    assert (tmp_path / RUN / "running.json").exists()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)


@pytest.mark.parametrize("words", [("--resume", "one"), ("--run-id", "one", "--resume", "auto")])
def test_a_run_in_progress_is_not_gone_on_with_by_another_launcher(tmp_path, words):
    process = start(tmp_path, SLEEP, "ready")
    done = subprocess.run([LAUNCH, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    told = f'falcon-launch: --resume: this run is in progress: "one"; wait for its launcher, process {process.pid}, or'
    assert (done.returncode, done.stderr) == (2, f"{told} end it with: falcon kill one\n")
    assert attempts(tmp_path) == 1
    assert falcon(tmp_path, "ps")[1].splitlines()[1].startswith("one ")
    process.terminate()
    process.communicate(timeout=20)


def test_a_run_that_ends_while_runs_are_listed_is_none(tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    file = tmp_path / "one/running.json"
    file.write_text("{}")
    with pytest.raises(UserError, match="remove it if nothing runs"):
        running.find_all(str(tmp_path))
    read = running._read
    monkeypatch.setattr(running, "_read", lambda path: (path.unlink(), read(path)))
    assert running.find_all(str(tmp_path)) == []
