"""A real Slurm over namespace hosts: munged, slurmctld on the first host, one slurmd on each.

Debian: apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge. The nodes claim as many CPUs as
they are told, at most those of this machine; jobs are confined to what they get by task/affinity.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from cluster.hosts import Host, Hosts
from cluster.machine import PATHS, wait_until

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
CONF = """
ClusterName=falcon
SlurmctldHost=node1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/spool/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/spool/%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=10
KillWait=3
MinJobAge=600
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
PropagateResourceLimits=NONE
"""


def missing() -> list[str]:
    """Programs of Slurm that this machine lacks."""
    return [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:{PATHS}") is None]


class Slurm:
    """Slurm on these hosts for as long as the ``with`` block lasts."""

    def __init__(self, hosts: Hosts, folder: Path, cpus: Sequence[int]) -> None:
        self.hosts = hosts
        self.folder = folder
        self.cpus = cpus
        """What each node claims to have."""
        self._daemons: list[subprocess.Popen[Any]] = []

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's programs need."""
        path = f"{os.environ['PATH']}:{PATHS}"
        outer = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return {**outer, "PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> Self:
        lacking = missing()
        assert not lacking, f"these tests need {', '.join(lacking)}; see make test-slurm"
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(self._conf())
        (self.folder / "cgroup.conf").write_text("ConstrainCores=no\n")
        try:
            self._start_munged()
            self._start(self.hosts[0], "slurmctld", "-D")
            for host in self.hosts:
                self.join(host)
            wait_until(lambda: self.idle_nodes() == len(self.cpus), 20, f"{self.folder}: idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(5)

    def join(self, host: Host) -> None:
        """Starts a host's slurmd."""
        (self.folder / "spool" / host.name).mkdir(exist_ok=True)
        self._start(host, "slurmd", "-D", "-N", host.name)

    def command(self, *words: str, cwd: Path | str = "/", timeout: float = 60) -> str:
        """One of Slurm's client programs, run on the first host to a good end; its output."""
        done = self.run(*words, cwd=cwd, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def run(
        self, *words: str, cwd: Path | str = "/", timeout: float = 60, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """A command on the first host, which is also where people submit; ``more``: variables for it."""
        return self.hosts[0].run(*words, cwd=cwd, timeout=timeout, env={**self.environment, **more})

    def idle_nodes(self) -> int:
        """Nodes that wait for work."""
        done = self.run("sinfo", "-h", "-t", "idle", "-o", "%D")
        return int(done.stdout.strip() or 0) if done.returncode == 0 else 0

    def submit(self, script: Path, *words: str) -> int:
        """Submits a job script from its own folder; its job id."""
        return int(self.command("sbatch", "--parsable", *words, str(script), cwd=script.parent))

    def facts(self, job: int) -> dict[str, str]:
        """What Slurm knows of a job."""
        told = self.command("scontrol", "--oneliner", "show", "job", str(job))
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def state(self, job: int) -> str:
        """How a job stands, in Slurm's word."""
        return self.facts(job)["JobState"]

    def until(self, job: int, *states: str, timeout: float = 120) -> dict[str, str]:
        """Waits until a job is in one of these states; what Slurm knows of it then."""
        deadline = time.monotonic() + timeout
        while (facts := self.facts(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} is {facts['JobState']}: {facts}"
            time.sleep(0.3)
        return facts

    def _conf(self) -> str:
        nodes = [f"NodeName={h.name} CPUs={n} RealMemory=1000" for h, n in zip(self.hosts, self.cpus, strict=True)]
        partition = "PartitionName=cpu Nodes=ALL Default=YES MaxTime=1:00:00 State=UP OverSubscribe=NO"
        return "\n".join([CONF.format(folder=self.folder), *nodes, partition, ""])

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = {"key-file": key, "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
        files["seed-file"] = "munge.seed"
        words = [f"--{name}={self.folder / value}" for name, value in files.items()]
        daemon = subprocess.Popen(
            ["munged", "--foreground", "--force", "--num-threads=2", *words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._daemons.append(daemon)
        wait_until((self.folder / "munge.sock").exists, what="munged")

    def _start(self, host: Host, name: str, *words: str) -> None:
        log = (self.folder / f"{name}-{host.name}.out").open("ab")
        with log:
            daemon = host.enter(name, *words, env=self.environment, stdout=log, stderr=log)
        self._daemons.append(daemon)
