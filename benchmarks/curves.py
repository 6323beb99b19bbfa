"""Loss curves of the demo model by strategy against plain fp32 Adam: a table, one JSON line and a picture.

    python benchmarks/curves.py FOLDER [--steps 300] [--tokens 128] [--svg docs/curves.svg] [--only NAME ...]

Every run is falcon-launch with the demo recipe on two ranks, the same rows in the same order. A run that is already
in FOLDER is not done again, and must be as long, with rows as long. Judged is the held-out loss at the end: within 1 %
of fp32's, full-lowmem's within 3 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

BIN: Final = Path(sys.executable).parent
RUNS: Final[dict[str, tuple[str, ...]]] = {
    "fp32": ("precision=fp32",),
    "bf16": (),
    "full-lowmem": ("strategy=full-lowmem",),
    "zero2": ("strategy=zero2",),
}
BOUNDS: Final = {"full-lowmem": 0.03}
"""Largest relative distance of the final held-out loss from fp32's; 0.01 for what is not named."""
COLOURS: Final = ("#222222", "#1f77b4", "#2ca02c", "#9467bd", "#d62728")
WINDOW: Final = 10
"""Steps averaged for the picture."""


def main() -> int:
    """Runs what is missing, then judges; exit code 1 where a bound is not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=128, help="length of a row")
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--only", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    flags = parser.parse_args()
    names = [name for name in RUNS if name in {*flags.only, "fp32"}]
    for name in names:
        if not (flags.folder / name / "report.json").is_file():
            train(flags, name)
    found = {name: read(flags.folder / name, flags) for name in names}
    reference = found["fp32"]["held_out"]
    kept = True
    for name, run in found.items():
        apart = run["held_out"] / reference - 1
        bound = BOUNDS.get(name, 0.01)
        kept &= abs(apart) <= bound
        print(f"{name:12} held-out loss {run['held_out']:.4f}  {apart:+.2%} of fp32's (bound {bound:.0%})")
    if flags.svg:
        flags.svg.write_text(picture({name: run["losses"] for name, run in found.items()}))
    told = {name: round(run["held_out"], 5) for name, run in found.items()}
    print(json.dumps({"steps": flags.steps, "held_out": told, "kept": kept}))
    return 0 if kept else 1


def train(flags: argparse.Namespace, name: str) -> None:
    """One run of two ranks, a row each in a step."""
    sets = [
        *(f"loop.max_steps={flags.steps}", "loop.global_batch=2", f"data.max_length={flags.tokens}"),
        *("evaluate.base=false", "evaluate.prompts=[]", "checkpoint.optimizer=false", "report.log_every=50"),
        *RUNS[name],
    ]
    words = ["--nproc-per-node", "2", "--runs-dir", str(flags.folder), "--run-id", name]
    words += [word for each in sets for word in ("--set", each)]
    subprocess.run([str(BIN / "falcon-launch"), *words], check=True)


def read(run: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Training losses by step and the held-out loss at the end; no run of another length is compared."""
    rank = run / "attempt_1" / "rank_0000"
    losses = [json.loads(line)["loss"] for line in (rank / "steps.jsonl").read_text().splitlines()]
    train = json.loads((run / "config.json").read_text())["train"]
    if (len(losses), train["data"]["max_length"]) != (flags.steps, flags.tokens):
        sys.exit(f"{run}: {len(losses)} steps, rows of {train['data']['max_length']} tokens; name another folder")
    told = json.loads((rank / "result.json").read_text())["summary"]["tuned"]["held_out"]
    return {"losses": losses, "held_out": told["loss"]}


def picture(curves: dict[str, list[float]]) -> str:
    """An SVG of the losses, each a moving average."""
    smooth = {name: _averages(losses) for name, losses in curves.items()}
    low, high = min(map(min, smooth.values())), max(map(max, smooth.values()))
    longest = max(map(len, smooth.values()))

    def point(step: int, loss: float) -> str:
        return f"{60 + 560 * step / longest:.1f},{20 + 300 * (high - loss) / (high - low):.1f}"

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="370" font-family="sans-serif" font-size="12">'
    ]
    parts.append('<rect width="760" height="370" fill="white"/><path d="M60,20V320H620" fill="none" stroke="#888"/>')
    for at in range(5):
        loss = low + (high - low) * at / 4
        y = 20 + 300 * (4 - at) / 4
        parts.append(f'<text x="52" y="{y + 4:.0f}" text-anchor="end">{loss:.2f}</text>')
        parts.append(f'<text x="{60 + 140 * at}" y="338" text-anchor="middle">{longest * at // 4}</text>')
    parts.append(f'<text x="340" y="358" text-anchor="middle">step (training loss, mean of {WINDOW} steps)</text>')
    for number, (name, losses) in enumerate(smooth.items()):
        line = " ".join(point(step, loss) for step, loss in enumerate(losses))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[number]}" stroke-width="1.3"/>')
        parts.append(f'<text x="632" y="{40 + 18 * number}" fill="{COLOURS[number]}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _averages(losses: list[float]) -> list[float]:
    return [sum(losses[at : at + WINDOW]) / WINDOW for at in range(len(losses) - WINDOW + 1)]


if __name__ == "__main__":
    sys.exit(main())
