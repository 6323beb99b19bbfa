"""Sixteen hosts at once, on one machine's few cores."""

from __future__ import annotations

import os
import time
from pathlib import Path

from launching import BIN

from cluster.hosts import Hosts

TELL = "import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])"


def test_sixteen_hosts(tmp_path: Path):
    with Hosts(16, tmp_path / "c") as hosts:
        begun = time.monotonic()
        done = hosts[0].run(str(BIN / "falcon"), "doctor", "--hosts", "node[1-16]", timeout=60)
        taken = time.monotonic() - begun
        assert done.stdout.count("MB/s") == 32, done.stdout + done.stderr
        assert taken < 20, f"{taken:.1f} s\n{done.stdout}"
        shared = tmp_path / "shared"
        shared.mkdir()
        (shared / "tell.py").write_text(TELL)
        words = ["--hosts", "node[1-16]", "--nproc-per-node", str(len(os.sched_getaffinity(0))), "--", "tell.py"]
        done = hosts[0].run(str(BIN / "falcon-launch"), *words, cwd=shared, timeout=60)
        assert done.returncode == 0, done.stderr
        (run,) = (shared / "runs").iterdir()
        assert len(list(run.glob("attempt_1/rank_*/stdout"))) == 16 * len(os.sched_getaffinity(0))
        assert done.stdout.count("rank 0 of") == 1
