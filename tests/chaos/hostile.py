"""Hosts that differ, strangers, secrets, and input that means harm: rows 20, 21, 26-30."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cluster.machine import command_line

from chaos import saving
from chaos.bed import LAUNCH, Bed, venv_site
from chaos.expect import ends_well, merge, refused, stopped, unharmed
from chaos.table import Fault, Found
from falcon_dist import checkpoint
from falcon_dist.contract import UserError
from falcon_dist.train_state import COUNTERS, optimizer_parts, optimizer_steps

AT = 25
CANARY = "canary-5be1f0"
EVIL = (
    *("-oProxyCommand=touch {file}", "node1;touch {file}", "$(touch {file})", "`touch {file}`", "node1&touch {file}"),
    *("node1|touch {file}", "node\u30021", "../node1", "node1\0", "node1 slots=4x", "no de 1 2", "[node1"),
)
KNOCKS = """
import os, socket, sys
for place in sys.argv[1:]:
    addr, _, port = place.rpartition(":")
    for data in (b"", b"GET / HTTP/1.0\\r\\n\\r\\n", os.urandom(65536), b"\\0" * 65536, b"{\\"token\\": \\"x\\"}\\n"):
        try:
            with socket.create_connection((addr.strip("[]"), int(port)), 2) as s:
                s.sendall(data)
                print("reached", place, flush=True)
        except OSError as fault:
            print("not reached", place, fault, flush=True)
"""
REMOTE_CODE = """
from pathlib import Path
Path({file!r}).touch()
from transformers import FalconConfig as Own, FalconForCausalLM as OwnModel
"""


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._file}",)


def other_torch(bed: Bed) -> Found:
    """One host has another torch."""
    with bed.last.overlaid(venv_site(), _other_version(bed, "torch")):
        job = bed.train()
        job.mark()
        return refused(bed, job, r"not the same software.*torch")


def other_version(bed: Bed) -> Found:
    """The software was changed between a run and its resume."""
    job = saving.abandoned(bed, AT)
    with bed.main.overlaid(venv_site(), _other_version(bed, "transformers")):
        return saving.resumed(bed, r"transformers.*0\.0\.1", lost=10, reached=job.steps())


def rows_differ(bed: Bed) -> Found:
    """One byte of the packed rows that a host keeps from an earlier run is another one."""
    cache = bed.shared / f"cache-{bed.mode}" if bed.mode == "local" else bed.all.disk / "own-cache"
    env = {"XDG_CACHE_HOME": str(cache)}
    if bed.mode == "hosts":
        bed.work = bed.all.disk / "rows"
        for host in bed.nodes:
            (host.disk / "rows").mkdir()
    first = bed.train("--set", "loop.max_steps=2", env=env)
    assert first.end() == 0, first.text()
    place = cache if bed.mode == "local" else bed.last.disk / "own-cache"
    files = [p for p in place.rglob("tokens.bin") if p.stat().st_size and "train" in str(p)]
    assert len(files) == 1, files
    data = bytearray(files[0].read_bytes())
    data[40] ^= 1
    files[0].write_bytes(data)
    second = bed.train(env=env, run="s")
    if bed.mode == "hosts":
        second.run = bed.main.disk / "rows/runs/s"
    second.mark()
    code = second.end()
    line = second.first_line(r"is not what was (written|sent)|damaged|received")
    wrong = ends_well(bed, second, code)
    return Found(
        detected_s=line.at - second.began if line else None,
        cause=line.text if line else "",
        orphans=bed.count_orphans(),
        exit_code=code,
        wrong=(*wrong, *([] if line else ["nothing said of it"])),
    )


def evil_hosts(bed: Bed) -> Found:
    """Shell words, options and odd letters in place of host names; a hostfile, or the list on the command line."""
    file, longest, wrong, lines = bed.work / CANARY, 0.0, [], []
    for number, text in enumerate(EVIL):
        word = text.format(file=file)
        hostfile = bed.work / f"hosts-{number}"
        hostfile.write_text(f"{word}\n")
        if bed.mode == "local" and "\0" in word:
            continue  # no argument can hold it
        given = ["--hosts", word] if bed.mode == "local" else ["--hostfile", str(hostfile)]
        began = time.monotonic()
        done = bed.main.run(LAUNCH, *given, "--", "x.py", cwd=bed.work, timeout=60)
        longest = max(longest, time.monotonic() - began)
        lines.append(done.stderr.strip())
        if done.returncode != 2 or len(done.stderr.strip().splitlines()) != 1:
            wrong.append(f"{word!r}: exit code {done.returncode}: {done.stderr.strip()[:100]}")
    wrong += ["a command of it ran"] if file.exists() else []
    return Found(detected_s=longest, cause=lines[1], orphans=bed.count_orphans(), exit_code=2, wrong=tuple(wrong))


def bombs_in_a_checkpoint(bed: Bed) -> Found:
    """Every file of the newest checkpoint is a pickle that runs a command, first under a manifest that is right."""
    file = bed.work / CANARY
    job = saving.abandoned(bed, AT)
    newest = saving.newest_of(job)
    files = sorted(checkpoint.read_manifest(newest)[1])
    _bomb(newest, [name for name in files if name != COUNTERS], file)  # those are read first
    tried = bed.resume()
    tried.mark()
    wrong = [*stopped(bed, tried, "--resume: .* cannot be used", (2,), within=120).wrong]
    wrong += ["it trained all the same"] if tried.steps(attempt=2) else []
    wrong += _taken(lambda: list(optimizer_parts(newest)), "the optimizer's state")
    _bomb(newest, [COUNTERS], file)
    wrong += _taken(lambda: optimizer_steps(newest), "counters")
    (newest / checkpoint.MANIFEST).write_bytes(pickle.dumps(Bomb(file)))
    found = saving.resumed(bed, f"refused .*{newest.name}", lost=20, reached=job.steps())
    return merge(found, [*wrong, *(["a command of it ran"] if file.exists() else [])])


def bomb_as_a_model(bed: Bed) -> Found:
    """A model whose weights are a pickle that runs a command."""
    file, model = bed.work / CANARY, bed.work / "model"
    shutil.copytree(bed.inputs / "model", model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(file)))
    job = bed.train("--set", f"model.name={model}")
    job.mark()
    found = refused(bed, job, r"safetensors|pickle|\.bin", within=60)
    return merge(found, ["a command of it ran"] if file.exists() else [])


def remote_code(bed: Bed) -> Found:
    """A model that brings code of its own."""
    file, model = bed.work / CANARY, bed.work / "model"
    shutil.copytree(bed.inputs / "model", model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "own.py").write_text(REMOTE_CODE.format(file=str(file)))
    job = bed.train("--set", f"model.name={model}")
    job.mark()
    found = refused(bed, job, r"code of its own|trust_remote_code", within=60)
    return merge(found, ["its code ran"] if file.exists() else [])


def stranger(bed: Bed) -> Found:
    """Another host of the network tries every port that is open while a run goes on."""
    job = bed.train()
    job.wait_step(5)
    places = [place for host in bed.nodes for place in host.listening()]
    job.mark()
    told = bed.stranger.run(sys.executable, "-c", KNOCKS, *places).stdout.splitlines()
    found = unharmed(bed, job)
    open_to_all = [place for place in places if place.startswith(("0.0.0.0", "*", "[::]"))]
    reached = [line for line in told if line.startswith("reached")]
    wrong = [f"open on every address: {', '.join(open_to_all)}"] if open_to_all else []
    wrong += ["a stranger reached a port of a run on one host"] if bed.mode == "local" and reached else []
    said = f"{len(set(places))} ports open, {len(set(reached))} reached by a stranger"
    return merge(replace(found, cause=said), wrong)


def secrets(bed: Bed) -> Found:
    """Tokens in the environment of a run."""
    env = {"HF_TOKEN": CANARY, "WANDB_API_KEY": CANARY}
    job = bed.train("--env", "WANDB_API_KEY", env=env)
    job.wait_step(5)
    seen = [command_line(pid) for host in bed.nodes for pid in host.pids()]
    found = unharmed(bed, job)
    kept = [p for p in job.run.rglob("*") if p.is_file() and CANARY.encode() in p.read_bytes()]
    wrong = [f"a secret in {path.relative_to(job.run)}" for path in kept]
    wrong += ["a secret on a command line"] if any(CANARY in line for line in seen) else []
    wrong += ["a secret in the output"] if CANARY in job.text() else []
    return merge(found, wrong)


def _bomb(folder: Path, names: list[str], file: Path) -> None:
    """Bombs in the place of these files of a checkpoint, whose manifest tells their sizes and hashes."""
    facts, files = checkpoint.read_manifest(folder)
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Bomb(file)))
    entries = {name: checkpoint.entry(checkpoint.told_of(folder / name)) for name in files}
    (folder / checkpoint.MANIFEST).write_text(checkpoint.manifest_text(facts, entries))
    assert checkpoint.fault_of(folder) is None, folder


def _taken(read: Callable[[], object], what: str) -> list[str]:
    """What is wrong where a reader takes a bomb for what its name says."""
    try:
        read()
    except UserError:
        return []
    return [f"a bomb was taken for {what}"]


def _other_version(bed: Bed, name: str) -> Path:
    """A folder to be laid over site-packages in which a distribution has another version."""
    upper = bed.work / "upper"
    (mine,) = venv_site().glob(f"{name}-[0-9]*.dist-info")
    other = upper / f"{name}-0.0.1.dist-info"
    shutil.copytree(mine, other)
    text = (other / "METADATA").read_text()
    version = mine.name.removeprefix(f"{name}-").removesuffix(".dist-info")
    (other / "METADATA").write_text(text.replace(f"\nVersion: {version}", "\nVersion: 0.0.1", 1))
    os.mknod(upper / mine.name, 0o600 | 0o020000, os.makedev(0, 0))  # hides the one below
    return upper


FAULTS = (
    Fault(number=20, name="other version since the save / on a host", local=other_version, hosts=other_torch),
    Fault(number=21, name="a byte of the packed rows differs", local=rows_differ, hosts=rows_differ),
    Fault(number=26, name="malicious host names", local=evil_hosts, hosts=evil_hosts, quick=True),
    Fault(
        number=27, name="pickle bombs in a checkpoint / as model", local=bombs_in_a_checkpoint, hosts=bomb_as_a_model
    ),
    Fault(number=28, name="a model that brings code", local=remote_code, hosts=remote_code),
    Fault(number=29, name="a stranger at every open port", local=stranger, hosts=stranger),
    Fault(number=30, name="secrets in the environment", local=secrets, hosts=secrets),
)
