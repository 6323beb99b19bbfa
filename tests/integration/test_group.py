"""What ranks find out about each other before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
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


BINDING = """
import torch.distributed as dist
def create(store, rank, size, timeout):
    print(f"stand-in group of rank {rank}")
    return dist.ProcessGroupGloo(store, rank, size, timeout)
dist.Backend.register_backend("ccl", create, devices=["cpu"])
"""


def test_intels_binding_is_taken_for_its_own_torch(tmp_path: Path) -> None:
    """A stand-in for the binding, registered as that one does: the real one is built for older torch only."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "oneccl_bindings_for_pytorch.py").write_text(BINDING)
    described = tmp_path / f"oneccl_bind_pt-{torch.__version__}.dist-info"
    described.mkdir()
    text = f"Metadata-Version: 2.1\nName: oneccl-bind-pt\nVersion: {torch.__version__}\n"
    (described / "METADATA").write_text(text)
    done = launch(tmp_path, "--nproc-per-node", "2", "--", "program.py", "ccl-intel")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("stand-in group of rank") == 2
    described.rename(tmp_path / "oneccl_bind_pt-2.1.0.dist-info")
    (tmp_path / "oneccl_bind_pt-2.1.0.dist-info" / "METADATA").write_text(text.replace(torch.__version__, "2.1.0"))
    refused = launch(tmp_path, "--nproc-per-node", "2", "--", "program.py", "ccl-intel")
    assert refused.returncode != 0
    assert f'oneccl_bindings_for_pytorch 2.1.0 is not for torch {torch.__version__}: "ccl-intel"' in (
        refused.stdout + refused.stderr
    )
