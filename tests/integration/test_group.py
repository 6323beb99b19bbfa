"""What ranks find out about each other before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import launch

PROGRAM = """
import os, sys
from falcon_dist.contract import UserError
from falcon_dist.process_group import agree_on, open_group, same_everywhere
from falcon_dist.world import World
world = World.from_env(os.environ)
with open_group(world, {**os.environ, "FALCON_BACKEND": sys.argv[1]}):
    assert agree_on(41 + world.rank) == 41
    same_everywhere(b"one manifest hash", "packed rows")
    try:
        same_everywhere(bytes([world.rank]), "packed rows")
    except UserError as error:
        print(error)
    else:
        sys.exit(1)
"""


@pytest.mark.parametrize("backend", ["gloo", "ccl"])
def test_ranks_with_other_data_are_told(tmp_path: Path, backend: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = launch(tmp_path, "--nproc-per-node", "2", "--", "program.py", backend)
    assert done.returncode == 0, done.stdout + done.stderr
    told = "packed rows: rank 0 and ranks [1] hold different ones; prepare every host from the same source"
    assert done.stdout.count(told) == 2
