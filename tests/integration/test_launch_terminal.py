"""Terminals and pipes that go away, or do not read, while a run goes on."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH, FALCON = (str(Path(sys.executable).parent / name) for name in ("falcon-launch", "falcon"))
TALK = """
import os, sys, time
until = time.monotonic() + float(sys.argv[1])
while time.monotonic() < until:
    print("line", flush=True)
    time.sleep(0.05)
"""
FLOOD = "import sys, time\nfor n in range(5000):\n    print('x' * 99)\nsys.stdout.flush()\ntime.sleep(12)\n"
BURST = "import os\nfor _ in range(12):\n    os.write(1, (b'x' * 99 + b'\\n') * 10_000)\n"


def start(folder: Path, *words: str, code: str = TALK, seconds: int = 2, **options) -> subprocess.Popen:
    (folder / "talk.py").write_text(code)
    return subprocess.Popen([*words, "--nproc-per-node", "1", "talk.py", str(seconds)], cwd=folder, **options)


def wait_for(folder: Path, name: str) -> Path:
    deadline = time.monotonic() + 10
    while not (found := list(folder.glob(f"runs/*/{name}"))):
        assert time.monotonic() < deadline, "did not come about in time"
        time.sleep(0.02)
    return found[0]


def report_of(folder: Path) -> dict:
    return json.loads(wait_for(folder, "report.json").read_text())


def test_a_pipe_whose_reader_died_does_not_end_the_run(tmp_path):
    process = start(tmp_path, LAUNCH, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path, "attempt_1/rank_0000/stdout")
    assert process.stdout
    process.stdout.close()
    assert process.wait(timeout=20) == 0
    assert process.stderr
    assert process.stderr.read() == ""
    assert report_of(tmp_path)["outcome"] == "ok"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_counts_although_the_terminal_is_gone(tmp_path, number):
    ours, its = pty.openpty()
    process = start(tmp_path, LAUNCH, seconds=60, stdout=its, stderr=its)
    os.close(its)
    wait_for(tmp_path, "attempt_1/rank_0000/stdout")
    os.close(ours)
    process.send_signal(number)
    assert process.wait(timeout=10) == 128 + number
    assert report_of(tmp_path)["outcome"] == "interrupted"


def test_a_run_under_nohup_outlives_a_logout(tmp_path):
    process = start(tmp_path, "nohup", LAUNCH, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_for(tmp_path, "attempt_1/rank_0000/stdout")
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=20)
    assert (process.returncode, report_of(tmp_path)["outcome"]) == (0, "ok")


def test_a_reader_that_waits_does_not_end_the_run(tmp_path):
    process = start(tmp_path, LAUNCH, code=FLOOD, stdout=subprocess.PIPE)
    assert report_of_a_long_run(tmp_path)["outcome"] == "ok"
    assert process.stdout
    assert select.select([process.stdout], [], [], 0)[0]
    assert process.stdout.read().count(b"x" * 99) == 5000
    assert process.wait(timeout=10) == 0


def test_much_output_at_once_all_arrives_and_does_not_end_the_run(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        process = start(tmp_path, LAUNCH, code=BURST, stdout=log, stderr=subprocess.PIPE, text=True)
        _, complaints = process.communicate(timeout=60)
    assert (process.returncode, complaints) == (0, "")
    assert (tmp_path / "log").read_text().count("x" * 99) == 120_000


def falcon(folder: Path, *words: str, closed: str = "", **options) -> subprocess.CompletedProcess:
    """A command as a shell starts it that redirects or closes its streams."""
    (folder / "talk.py").write_text(TALK)
    options = {"stderr": subprocess.PIPE, **options}
    line = ["sh", "-c", f'exec "$@" {closed}', "sh", *words, "--nproc-per-node", "1", "talk.py", "0"]
    return subprocess.run(line, cwd=folder, timeout=60, check=False, text=True, **options)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_change_nothing(tmp_path, closed):
    done = falcon(tmp_path, LAUNCH, closed=closed)
    assert (done.returncode, done.stderr) == (0, "")
    assert report_of(tmp_path)["outcome"] == "ok"


def test_a_plan_that_cannot_be_written_is_told_in_a_line(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = falcon(tmp_path, LAUNCH, "--dry-run", stdout=full)
    assert (done.returncode, done.stderr) == (1, "falcon-launch: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = falcon(tmp_path, LAUNCH, "--dry-run", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_report_as_json_stands_alone_on_standard_output(tmp_path):
    done = falcon(tmp_path, LAUNCH, "--json", "--report-bindings", "--explain", stdout=subprocess.PIPE)
    assert json.loads(done.stdout)["outcome"] == "ok"
    assert done.stderr.startswith("host ")
    done = falcon(tmp_path, LAUNCH, "--json", "--explain", "--dry-run", stdout=subprocess.PIPE)
    assert list(json.loads(done.stdout)) == ["nodes"]
    assert "cpu" in done.stderr


@pytest.mark.parametrize("words", [(FALCON, "report"), (LAUNCH, "--resume")])
def test_a_name_that_no_run_can_have_is_told_in_a_line(tmp_path, words):
    done = subprocess.run([*words, "x" * 300], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "File name too long" in done.stderr


def report_of_a_long_run(folder: Path) -> dict:
    time.sleep(12)
    return report_of(folder)


@pytest.mark.parametrize("words", [["help"], ["topology"], ["estimate", "demo"]])
def test_a_verb_whose_reader_has_left_ends_without_a_traceback(tmp_path, words):
    reader, writer = os.pipe()
    os.close(reader)
    falcon = [str(Path(sys.executable).parent / "falcon"), *words]
    fresh = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}  # what is made at first use is not told either
    done = subprocess.run(
        falcon, cwd=tmp_path, env=fresh, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=240, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
