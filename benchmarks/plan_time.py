"""Seconds until a plan is shown: falcon-launch --dry-run and --help beside --help of torchrun and accelerate launch.

    python benchmarks/plan_time.py [--repeat 9]

All in turns, each a process of its own, after one round that is not counted (modules are compiled in it). Of every
sample both the clock and the processor's time: the first is what a person waits for, the second what other work on
the machine changes least. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
COMMANDS = {
    "falcon-launch --dry-run": [str(BIN / "falcon-launch"), "--dry-run"],
    "falcon-launch --help": [str(BIN / "falcon-launch"), "--help"],
    "torchrun --help": [str(BIN / "torchrun"), "--help"],
    "accelerate launch --help": [str(BIN / "accelerate"), "launch", "--help"],
}


def sample(words: Sequence[str], folder: str) -> tuple[float, float]:
    """Seconds by the clock and of the processor that one such process and its children take."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(words, cwd=folder, env=environ, stdout=subprocess.DEVNULL, check=True)
    took, after = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(repeat: int) -> dict[str, dict[str, float]]:
    """Medians of each command's clock and processor seconds."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + repeat):
            for name, words in COMMANDS.items():
                samples[name].append(sample(words, folder))
    return {
        name: {
            "seconds": round(statistics.median(took for took, _ in taken[1:]), 3),
            "cpu_seconds": round(statistics.median(worked for _, worked in taken[1:]), 3),
        }
        for name, taken in samples.items()
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=9)
    found = measure(parser.parse_args().repeat)
    ours, theirs = found["falcon-launch --dry-run"], found["torchrun --help"]
    for name, values in found.items():
        print(f"{name:26} {values['seconds']:.3f} s, {values['cpu_seconds']:.3f} s of the processor")
    ratio = theirs["cpu_seconds"] / ours["cpu_seconds"]
    print(json.dumps({**found, "torchrun_to_dry_run": round(ratio, 1), "load": round(os.getloadavg()[0], 1)}))


if __name__ == "__main__":
    main()
