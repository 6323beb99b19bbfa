"""kill -9 while checkpoints are being saved: what was told as committed is there, and nothing half-made is taken."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

from falcon_dist import checkpoint

KILLS = 200
SAVE_FOR_EVER = """
import itertools, os, sys
from pathlib import Path
from falcon_dist import checkpoint
root = Path(sys.argv[1])
for step in itertools.count(int(sys.argv[2])):
    with checkpoint.committed(root, step, {"run_id": "r"}) as folder:
        for name in ("model-1.safetensors", "model-2.safetensors", "train_state/optimizer.safetensors"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(os.urandom(50_000))
    print(step, flush=True)
"""


def test_killed_at_any_point_the_newest_told_checkpoint_verifies(tmp_path: Path) -> None:
    chance = random.Random()
    step, half_made = 1, 0
    for _ in range(KILLS):
        words = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path), str(step)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            told = int(process.stdout.readline())
            time.sleep(chance.uniform(0, 0.03))
            process.kill()
            told = max([told, *map(int, process.stdout.read().split())])
        half_made += len(list(tmp_path.glob("*.partial-*")))
        choice = checkpoint.newest_verified(tmp_path)
        assert choice.refused == ()
        assert choice.newest is not None
        assert choice.newest.step >= told
        checkpoint.clear_partial(tmp_path)
        step = choice.newest.step + 1
    assert half_made > KILLS / 4, "the kills came between the saves, not within them"
