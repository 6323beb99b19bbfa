"""``python -m falcon_dist.ccl build`` compiles the backend; ``check`` proves an all_reduce between two ranks.

``build`` is a step to run once per host before ranks start. Exit codes: 0, 1 where the check fails,
2 where oneCCL or a compiler is missing (one line on stderr says what to do).
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from falcon_dist import contract
from falcon_dist.ccl.build import ensure_built
from falcon_dist.contract import EXIT_FAILED, EXIT_USER_ERROR, UserError

_CHECK_RANKS: Final = 2
_CHECK_TIMEOUT_S: Final = 120
_ELEMENTS: Final = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m falcon_dist.ccl", description=__doc__)
    parser.add_argument("verb", choices=["build", "check"])
    parser.add_argument("--store", help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if flags.store:
            return _check_rank(flags.store)
        print(ensure_built())
        return _check() if flags.verb == "check" else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _check() -> int:
    """Starts two ranks of this program, which meet through a file."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "falcon_dist.ccl", "check", "--store", str(Path(folder) / "store")]
        children = [subprocess.Popen(argv, env=os.environ | _coordinates(rank)) for rank in range(_CHECK_RANKS)]
        try:
            codes = [child.wait(timeout=_CHECK_TIMEOUT_S) for child in children]
        finally:
            for child in children:
                child.kill()
    good = not any(codes)
    print(f"all_reduce over ccl between {_CHECK_RANKS} ranks: {'ok' if good else f'failed, exit codes {codes}'}")
    return 0 if good else EXIT_FAILED


def _coordinates(rank: int) -> dict[str, str]:
    return {
        contract.RANK: str(rank),
        contract.WORLD_SIZE: str(_CHECK_RANKS),
        contract.LOCAL_RANK: str(rank),
        contract.LOCAL_WORLD_SIZE: str(_CHECK_RANKS),
        contract.MASTER_ADDR: "127.0.0.1",
    }


def _check_rank(store: str) -> int:
    rank = int(os.environ[contract.RANK])
    dist.init_process_group("ccl", store=FileStore(store, _CHECK_RANKS), rank=rank, world_size=_CHECK_RANKS)
    good = True
    for dtype in (torch.float32, torch.bfloat16):
        data = torch.full((_ELEMENTS,), float(rank + 1), dtype=dtype)
        dist.all_reduce(data)
        good = good and bool((data == sum(range(_CHECK_RANKS + 1))).all())
    dist.destroy_process_group()
    return 0 if good else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
