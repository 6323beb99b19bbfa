"""What the estimate says of named runs of the demo's model, and what their ranks took.

    python benchmarks/memory_runs.py FOLDER [--only NAME ...]

Each run takes a few steps through falcon-launch, in rows of 512 tokens, without held-out rows or answers. Predicted is
what the launcher says before loading; the peak is the largest VmHWM of its ranks. One JSON line a run; exit code 1
where one is off by more than 10 %, with ZeRO 20 %.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

BIN: Final = Path(sys.executable).parent
GIB: Final = 1 << 30
STEPS: Final = 3
WITHOUT: Final = (
    "data.eval_share=0",
    "evaluate.base=false",
    "evaluate.prompts=[]",
    f"loop.max_steps={STEPS}",
)
RUNS: Final[dict[str, tuple[int, tuple[str, ...]]]] = {
    "ddp": (1, ("loop.micro_batch=2", "loop.global_batch=4")),
    "ddp on two ranks": (2, ("loop.micro_batch=1", "loop.global_batch=4")),
    "ddp, fp32": (1, ("precision=fp32", "loop.micro_batch=1", "loop.global_batch=2")),
    "ddp, recomputed": (1, ("loop.grad_checkpointing=true", "loop.micro_batch=4", "loop.global_batch=4")),
    "lora on two ranks": (2, ("strategy=lora", "loop.micro_batch=2", "loop.global_batch=4")),
    "full-lowmem on two ranks": (2, ("strategy=full-lowmem", "loop.micro_batch=1", "loop.global_batch=2")),
    "zero2 on two ranks": (2, ("strategy=zero2", "loop.micro_batch=1", "loop.global_batch=2")),
    "zero3 on two ranks": (2, ("strategy=zero3", "loop.micro_batch=1", "loop.global_batch=2")),
}
"""Name to ranks and settings."""


def main() -> int:
    """Runs them one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for the run folders")
    parser.add_argument("--only", action="append", choices=tuple(RUNS), metavar="NAME", help=", ".join(RUNS))
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True, exist_ok=True)
    told = [measure(name, flags.folder.resolve()) for name in flags.only or RUNS]
    return int(not all(run["within"] for run in told))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One run: GiB predicted, GiB taken, by what share the first is off."""
    ranks, settings = RUNS[name]
    words = [str(BIN / "falcon-launch"), "--nproc-per-node", str(ranks), "--runs-dir", str(folder)]
    words += ["--run-id", (run_id := re.sub(r"\W+", "-", name))]
    words += [word for setting in (*WITHOUT, *settings) for word in ("--set", setting)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    said = re.search(r"memory per rank, at most about: ([\d.]+) GiB(.*)", done.stdout)
    if done.returncode or said is None:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    report = json.loads((folder / run_id / "report.json").read_text())
    peak = max(rank["result"]["peak_rss_bytes"] for rank in report["ranks"]) / GIB
    off = float(said[1]) / peak - 1
    most = 0.2 if "zero" in name else 0.1
    told = {"run": name, "predicted_gib": float(said[1]), "vmhwm_gib": round(peak, 2), "off": round(off, 3)}
    told |= {"of": said[2].strip(" ="), "within": abs(off) <= most}
    print(json.dumps(told), flush=True)
    return told


if __name__ == "__main__":
    sys.exit(main())
