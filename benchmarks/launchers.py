"""One training program under every launcher, in turns: seconds to its first step, and tokens per second from then on.

    python benchmarks/launchers.py [--ranks 2] [--steps 12] [--rounds 3] [--ipexrun PATH]

The program is plain PyTorch: DistributedDataParallel over gloo, bfloat16, AdamW, a Llama shape of 31 million
parameters on rows of 256 made-up tokens. It is the same for all; only the command before it differs. Launchers that
are not installed are named and left out: torchrun comes with torch, accelerate and mpirun (hydra, of oneccl-cpu-devel)
with this project, deepspeed with make test-cluster; ipexrun lives where intel_extension_for_pytorch is installed.
falcon-launch is also measured with the one line that takes our backend in place of gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

BIN: Final = Path(sys.executable).parent
PATIENCE_S: Final = 300.0
PROGRAM: Final = """
import os, sys, time
import torch, torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM
backend, steps, begun = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
if backend == "ccl":
    import falcon_dist.ccl
for name, given in (("RANK", "PMI_RANK"), ("WORLD_SIZE", "PMI_SIZE")):
    if name not in os.environ:
        os.environ[name] = os.environ[given]
dist.init_process_group(backend)
torch.manual_seed(dist.get_rank())
shape = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8, vocab_size=16384)
model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
for step in range(steps + 2):
    rows = torch.randint(16384, (2, 256))
    model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    dist.barrier()
    if step == 0:
        first = time.time() - begun
    if step == 1:  # the first two warm up
        started = time.time()
took = (time.time() - started) / steps
if dist.get_rank() == 0:
    print("told", first, dist.get_world_size() * rows.numel() / took, flush=True)
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def contenders(ranks: int, ipexrun: str | None) -> dict[str, list[str]]:
    """Name and command of every launcher that is here; the program's path and arguments follow."""
    count = str(ranks)
    accelerate = ["launch", "--cpu", "--num_processes", count, "--num_machines", "1", "--mixed_precision", "no"]
    known = {
        "falcon-launch": [str(BIN / "falcon-launch"), "--nproc-per-node", count, "--"],
        "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", count],
        "accelerate launch": [str(BIN / "accelerate"), *accelerate],
        "mpirun": [str(BIN / "mpiexec.hydra"), "-n", count, sys.executable],
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", count],
        "ipexrun": [ipexrun or "ipexrun", "--nprocs-per-node", count, "--no-python", sys.executable],
    }
    return {name: words for name, words in known.items() if shutil.which(words[0])}


def run(words: list[str], backend: str, steps: int, folder: Path) -> tuple[float, float]:
    """Seconds from the command to the end of the first step, and tokens per second of all ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "MASTER_ADDR": "127.0.0.1",  # for mpirun, which gives ranks nothing to meet by
        "MASTER_PORT": str(port),
        "I_MPI_ROOT": str(BIN.parent),
        "LD_LIBRARY_PATH": str(BIN.parent / "lib"),
        "DS_ACCELERATOR": "cpu",
    }
    # falcon-launch hands nothing of this to its ranks.
    done = subprocess.run(
        [*words, str(folder / "program.py"), backend, str(steps), str(time.time())],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    found = re.search(r"told (\S+) (\S+)", done.stdout)
    if done.returncode or not found:
        sys.exit(f"{words[0]} ended with {done.returncode}:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    return float(found[1]), float(found[2])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ipexrun", metavar="PATH")
    given = parser.parse_args()
    here = contenders(given.ranks, given.ipexrun)
    ways = {
        "falcon-launch, ccl": (here["falcon-launch"], "ccl"),
        **{name: (words, "gloo") for name, words in here.items()},
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program.py").write_text(PROGRAM)
        for _ in range(given.rounds):
            for way, (words, backend) in ways.items():
                taken[way].append(run(words, backend, given.steps, folder))
    rows = {way: [statistics.median(column) for column in zip(*times, strict=True)] for way, times in taken.items()}
    print(f"{'launcher':<20}{'first step after s':>20}{'tokens/s':>10}")
    for way, (first, speed) in rows.items():
        print(f"{way:<20}{first:>20.2f}{speed:>10.0f}")
    told = {
        way: {"first_step_s": round(first, 2), "tokens_per_s": round(speed)} for way, (first, speed) in rows.items()
    }
    print(json.dumps({"ranks": given.ranks, "rounds": given.rounds, "load": os.getloadavg()[0], "launchers": told}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
