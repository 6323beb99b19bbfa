"""Seconds from the command to all ranks running: falcon-launch against torchrun started in parallel over ssh.

    python benchmarks/launch_time.py node1,node2 [--repeat 5] [--nproc 2]
    python benchmarks/launch_time.py --namespaces           two hosts made here (root; see make test-cluster)

A rank runs when its first line has come to the terminal. Both start the same plain Python program on the same hosts,
in turns. The first host must be the one this runs on, or ssh must lead to it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BIN = Path(sys.executable).parent
PROGRAM = 'import os, time; print("running", os.environ["RANK"], flush=True); time.sleep(2)\n'
PORT = 29511
PATIENCE_S = 120.0


def falcon(hosts: Sequence[str], nproc: int, program: Path) -> list[list[str]]:
    """One command for all hosts."""
    words = [str(BIN / "falcon-launch"), "--hosts", ",".join(hosts), "--nproc-per-node", str(nproc)]
    return [[*words, "--runs-dir", str(program.parent / "runs"), "--", str(program)]]


def torchrun(hosts: Sequence[str], nproc: int, program: Path) -> list[list[str]]:
    """One command for each host."""
    common = [str(BIN / "torchrun"), "--nnodes", str(len(hosts)), "--nproc-per-node", str(nproc)]
    common += ["--master-addr", hosts[0], "--master-port", str(PORT)]
    return [
        ["ssh", "-o", "BatchMode=yes", host, shlex.join([*common, "--node-rank", str(number), str(program)])]
        for number, host in enumerate(hosts)
    ]


def seconds_until_running(commands: Sequence[Sequence[str]], num_ranks: int) -> float:
    """Starts the commands side by side and reads until every rank has said its line."""
    begun = time.monotonic()
    reader, writer = os.pipe()
    processes = [subprocess.Popen(words, stdout=writer, stderr=subprocess.PIPE) for words in commands]
    os.close(writer)
    said, took = 0, 0.0
    with os.fdopen(reader) as lines:
        for line in lines:
            said += line.count("running")  # two ranks may share a line
            if said == num_ranks and not took:
                took = time.monotonic() - begun
    errors = [process.communicate(timeout=PATIENCE_S)[1].decode() for process in processes]
    assert said == num_ranks, f"{said} of {num_ranks} ranks ran: {commands[0]}\n{''.join(errors)[-2000:]}"
    return took


def measure(hosts: Sequence[str], nproc: int, repeat: int) -> None:
    """Both in turns; prints every sample and the medians."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        program = Path(folder) / "running.py"
        program.write_text(PROGRAM)
        samples: dict[str, list[float]] = {"falcon-launch": [], "torchrun over ssh": []}
        for _ in range(repeat):
            for name, make in (("falcon-launch", falcon), ("torchrun over ssh", torchrun)):
                samples[name].append(seconds_until_running(make(hosts, nproc, program), len(hosts) * nproc))
    for name, taken in samples.items():
        print(f"{name:18} median {statistics.median(taken):.2f} s of {' '.join(f'{t:.2f}' for t in taken)}")
    ours, theirs = (statistics.median(taken) for taken in samples.values())
    print(f"falcon-launch - torchrun: {ours - theirs:+.2f} s (load of this machine {os.getloadavg()[0]:.1f})")


def in_namespaces(repeat: int, nproc: int) -> int:
    """Runs this program again on the first of two namespace hosts."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from cluster.hosts import Hosts

    with tempfile.TemporaryDirectory() as folder, Hosts(2, Path(folder) / "c") as hosts:
        words = [sys.executable, str(Path(__file__).absolute()), "node1,node2", "--repeat", str(repeat)]
        done = hosts[0].run(*words, "--nproc", str(nproc), cwd=folder, timeout=600)
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
        return done.returncode


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hosts", nargs="?", help="names with commas between them")
    parser.add_argument("--namespaces", action="store_true", help="make two hosts on this machine")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--nproc", type=int, default=1, help="ranks on each host")
    given = parser.parse_args()
    if given.namespaces:
        return in_namespaces(given.repeat, given.nproc)
    if not given.hosts:
        parser.error("give hosts, or --namespaces")
    measure(given.hosts.split(","), given.nproc, given.repeat)
    return 0


if __name__ == "__main__":
    sys.exit(main())
