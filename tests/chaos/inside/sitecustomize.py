"""Brings a fault about inside one rank, at one step of a run's first attempt: CHAOS="RANK:STEP:WHAT" and PYTHONPATH.

Python imports a module of this name in every process before anything else; in all but the one rank it does nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import time
from pathlib import Path
from typing import Any


class ChaosError(RuntimeError):
    """What "raise" raises."""


def in_main_thread(kind: type[BaseException]) -> None:
    """The next bytecode of the main thread raises this."""
    main = ctypes.c_ulong(threading.main_thread().ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(kind))


def flip_a_weight() -> None:
    """One bit of one weight of this rank differs from now on: of the fp32 master, of which the bf16 weight is a
    copy that every step makes anew.
    """
    import torch

    optimizers = [o for o in gc.get_objects() if isinstance(o, torch.optim.Optimizer)]
    masters = [state["master"] for one in optimizers for state in one.state.values() if "master" in state]
    masters[-1].view(torch.int32).view(-1)[7] ^= 1 << 20  # a low one can be rounded away by the next update


def bring_about(what: str) -> None:
    match what:
        case "raise":
            in_main_thread(ChaosError)
        case "segfault":
            ctypes.string_at(0)
        case "hold the interpreter":
            ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the lock that every thread needs
        case "flip a weight":
            flip_a_weight()


def last_step(file: Path) -> int:
    with contextlib.suppress(OSError):
        return len(file.read_bytes().splitlines())
    return 0


def watch(file: Path, step: int, what: str) -> None:
    while last_step(file) < step:
        time.sleep(0.01)
    Path(file.parent, "injected").write_text(repr(time.monotonic()))
    bring_about(what)


def begin(env: Any) -> None:
    rank, step, what = env["CHAOS"].split(":")
    if env.get("RANK") == rank and env.get("TORCHELASTIC_RESTART_COUNT") == "0" and "FALCON_RANK_DIR" in env:
        file = Path(env["FALCON_RANK_DIR"], "steps.jsonl")
        threading.Thread(target=watch, args=(file, int(step), what), daemon=True).start()


if "CHAOS" in os.environ:
    begin(os.environ)
