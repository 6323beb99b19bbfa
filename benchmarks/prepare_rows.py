"""How fast and in how much memory records become packed rows, and what a second start costs.

    python benchmarks/prepare_rows.py [--records 200000] [--packing wrapped] [--loss answers]

Writes a JSONL file of talks, prepares it twice, each time in a process of its own, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, resource, sys, time
from falcon_dist.config import DataConfig, ModelConfig
from falcon_dist.dataset import prepare_rows
from falcon_dist.engine.native import load_tokenizer
from falcon_dist.prepare import find_model
model = ModelConfig(name=sys.argv[2])
tokenizer = load_tokenizer(find_model(model), model)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.monotonic()
store = prepare_rows(DataConfig(**json.loads(sys.argv[1])), tokenizer)
seconds = time.monotonic() - start
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"s": seconds, "before_kib": before, "after_kib": after, "facts": store.facts["train"]}))
"""


def write_talks(path: Path, records: int) -> None:
    """Talks of two to six turns over a fixed vocabulary; the same bytes each time."""
    chance = random.Random(0)  # noqa: S311  # text, not secrets
    words = ["".join(chance.choices("abcdefghijklmnoprstuvw", k=chance.randint(2, 9))) for _ in range(5000)]
    with path.open("w") as file:
        for number in range(records):
            turns = 2 * chance.randint(1, 3)
            messages = [
                {
                    "role": ("user", "assistant")[i % 2],
                    "content": " ".join(chance.choices(words, k=chance.randint(5, 40))),
                }
                for i in range(turns)
            ]
            file.write(json.dumps({"id": number, "messages": messages}) + "\n")


def measure(settings: dict[str, object], model: str, cache: Path) -> dict[str, float]:
    """One preparation in a fresh process."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    words = [sys.executable, "-c", CHILD, json.dumps(settings), model]
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Prints one line for each start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--packing", default="wrapped")
    parser.add_argument("--loss", default="answers")
    parser.add_argument("--model", required=True, help="a model folder or hub name, for its tokenizer")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "talks.jsonl"
        write_talks(file, args.records)
        settings = {"name": str(file), "packing": args.packing, "loss": args.loss, "eval_share": 0.01}
        print(f"{args.records:,} records, {file.stat().st_size / 2**20:.0f} MiB, {args.packing}, loss on {args.loss}")
        print("| start | seconds | records/s | tokens | peak RSS | RSS before |\n|---|---|---|---|---|---|")
        for start in ("first", "second"):
            m = measure(settings, args.model, Path(folder) / "cache")
            print(
                f"| {start} | {m['s']:.1f} | {args.records / m['s']:,.0f} | {m['facts']['tokens']:,} | "
                f"{m['after_kib'] / 1024:.0f} MiB | {m['before_kib'] / 1024:.0f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
