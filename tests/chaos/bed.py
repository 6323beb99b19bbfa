"""Where faults are injected: namespace hosts, a small model with its data, and what an undisturbed run comes to."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from cluster.hosts import Host, Hosts
from launching import BIN
from safetensors import SafetensorError, safe_open
from tiny_models import TEXT, falcon_7b, write_model

from chaos.job import END_S, Job
from chaos.table import Mode

LAUNCH, FALCON = str(BIN / "falcon-launch"), str(BIN / "falcon")
STEPS, EVERY = 120, 10
INSIDE = Path(__file__).with_name("inside")
RECIPE = """
[model]
name = "{folder}/model"
[data]
name = "{folder}/data.jsonl"
max_length = 32
[optim]
lr = 1e-3
warmup_steps = 2
[loop]
global_batch = 4
max_steps = {steps}
[checkpoint]
every = {every}
[evaluate]
base = false
prompts = []
[launch]
backend = "gloo"
"""
POISON = "\u00b6"
"""A character that stands in one record only: a model that knows no finite number for it spoils one step."""


class Bed:
    """One mode: ``local`` is a launcher with two ranks on one host, ``hosts`` one rank on each of two hosts."""

    def __init__(self, mode: Mode, hosts: Hosts, first: int = 1) -> None:
        """``first``: number of its first host."""
        self.mode = mode
        self.all = hosts
        self._first = first
        self.nodes: list[Host] = hosts.hosts[first - 1 :][: 1 if mode == "local" else 2]
        self.stranger: Host = hosts.hosts[2]
        self.shared = hosts.folder / "shared"
        """Seen by all hosts."""
        self.inputs = self.shared / "inputs"
        self.reference: Mapping[str, str] = {}
        """sha256 of every tensor of weights and optimizer that an undisturbed run ends with."""
        self.start_s = 0.0
        """Seconds from an undisturbed run's start to its first step."""
        self.work = self.shared

    @property
    def main(self) -> Host:
        """The host the launcher is on."""
        return self.nodes[0]

    @property
    def last(self) -> Host:
        """The host of the last rank."""
        return self.nodes[-1]

    def seats(self, nodes: int | None = None) -> list[str]:
        """Flags for two ranks."""
        if self.mode == "local":
            return ["--nproc-per-node", "2"]
        named = f"node[{self._first}-{self._first + (nodes or len(self.nodes)) - 1}]"
        return ["--hosts", named, "--nproc-per-node", "1", "--ncores-per-rank", "1"]

    def train(self, *flags: str, env: Mapping[str, str] | None = None, run: str = "r") -> Job:
        """Our own training program on the small model."""
        recipe = ["--recipe", str(self.inputs / "recipe.toml")]
        return self.launch([*self.seats(), *recipe, "--run-id", run, *flags], env=env, run=run)

    def program(self, text: str, *flags: str, args: Sequence[str] = ()) -> Job:
        """Somebody else's program."""
        (self.work / "program.py").write_text(text)
        return self.launch([*self.seats(), "--run-id", "r", *flags, "--", "program.py", *args])

    def launch(
        self,
        words: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        run: str = "r",
        open_files: int | None = None,
    ) -> Job:
        """Any command line, in this row's folder."""
        whole = {**os.environ, "XDG_CACHE_HOME": str(self.shared / "cache"), **(env or {})}
        limited = [] if open_files is None else ["prlimit", f"--nofile={open_files}:{open_files}"]
        return Job(self.nodes, [*limited, LAUNCH, *words], self.work, whole, self.work / "runs" / run)

    def resume(self, *flags: str, env: Mapping[str, str] | None = None, run: str = "r") -> Job:
        """Goes on with a run of this row."""
        return self.launch([*self.seats(), "--resume", run, *flags], env=env, run=run)

    def inside(self, rank: int, step: int, what: str) -> list[str]:
        """Flags for a fault inside a rank of the first attempt."""
        return ["--env", f"CHAOS={rank}:{step}:{what}", "--env", f"PYTHONPATH={INSIDE}"]

    def weights(self, run: Path, step: int = STEPS) -> Mapping[str, str]:
        """sha256 of every tensor that a run has at a step, for which ranks wrote which of them is not the same where
        a host does not see the folder; empty: it has no such checkpoint.
        """
        folder, found = run / f"checkpoints/step-{step:06d}", {}
        with suppress(OSError, ValueError, SafetensorError):
            for file in (*folder.glob("model*.safetensors"), *folder.glob("train_state/optimizer*.safetensors")):
                found |= digests(file)
        return found

    def compute_reference(self) -> None:
        """The undisturbed run."""
        self.work = self.shared / f"reference-{self.mode}"
        self.work.mkdir()
        job = self.train()
        self.start_s = job.wait_step(1) - job.began
        assert job.end() == 0, job.text()
        self.reference = self.weights(job.run)
        assert self.reference, job.text()

    @contextmanager
    def row(self, number: int) -> Iterator[None]:
        """A folder for one row, and hosts as they were after it, whatever happened in it."""
        self.work = self.shared / f"row-{number:02d}-{self.mode}"
        self.work.mkdir()
        try:
            yield
        finally:
            for pid in self.left():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for host in self.all:
                if host.init is None:
                    host.reboot()

    def left(self) -> list[int]:
        """Processes that are neither a host's first one nor its sshd."""
        return [pid for host in self.nodes for pid in host.pids() if pid not in _own(host)]

    def count_orphans(self) -> int:
        """Processes and listening sockets that are still there some time after a launcher's end."""
        deadline = time.monotonic() + END_S
        while (
            count := len(self.left()) + sum(len(host.listening()) for host in self.nodes)
        ) and time.monotonic() < deadline:
            time.sleep(0.1)
        return count


def write_inputs(folder: Path) -> None:
    """Model, data and recipe."""
    folder.mkdir(parents=True)
    # Output weights of their own: those of a token that never comes up are as they were.
    write_model(folder / "model", falcon_7b(tie_word_embeddings=False))
    lines = [{"text": f"{n}: {TEXT[n % len(TEXT)]}"} for n in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder, steps=STEPS, every=EVERY))


def digests(file: Path) -> dict[str, str]:
    """sha256 of each tensor of a safetensors file, by the file's kind and the tensor's name."""
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    kind = file.name[:5]
    return {
        f"{kind} {name}": hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors.items()
    }


def build_library(source: str, folder: Path, name: str) -> Path:
    """A shared object to be preloaded, from C."""
    (folder / f"{name}.c").write_text(source)
    library = folder / f"{name}.so"
    words = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / f"{name}.c"), "-ldl"]
    subprocess.run(words, check=True)
    return library


def _own(host: Host) -> set[int]:
    """The first process and the listening sshd."""
    if host.init is None:
        return set()
    children = Path(f"/proc/{host.init}/task/{host.init}/children").read_text().split()
    sshd = [int(pid) for pid in children if b"sshd" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return {host.init, *_parents(host), *sshd}


def _parents(host: Host) -> list[int]:
    """unshare, which waits for the host's first process."""
    status = Path(f"/proc/{host.init}/stat").read_text().rpartition(")")[2].split()
    return [int(status[1])]


def venv_site() -> Path:
    """Where this interpreter's packages are."""
    return Path(sys.prefix) / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
