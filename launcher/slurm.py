"""What Slurm says of a job (SLURM_*) -> its hosts and cpus, and the one srun that starts all agents. Pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from falcon_dist.contract import EXIT_FAILED
from launcher.cluster import HostFacts
from launcher.errors import UserError
from launcher.hostfile import LOCAL, HostEntry, Hostfile, parse_list

JOB: Final = "SLURM_JOB_ID"
NODELIST: Final = "SLURM_JOB_NODELIST"
STEP: Final = "SLURM_STEP_ID"
SRUN: Final = (
    "srun",
    "--kill-on-bad-exit=1",
    # Agents bind their ranks themselves, inside whatever the job has got.
    "--cpu-bind=none",
    # Beside other steps of the job, the batch script and other launchers among them.
    "--overlap",
    "--ntasks-per-node=1",
    "--job-name=falcon-launch",
    "--input=all",
    "--quiet",
)
NOT_FOR_SRUN: Final = ("SRUN_CPUS_PER_TASK", "SLURM_CPUS_PER_TASK", "SLURM_CPU_BIND", "SLURM_HINT")
"""Variables by which a job script's options would change or contradict the words above."""
_NOT_ENDED: Final = (
    *("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "STOPPED", "SIGNALING", "STAGE_OUT"),
    *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESIZING", "RESV_DEL_HOLD"),
)
_REQUEUED: Final = ("NODE_FAIL", "PREEMPTED", "BOOT_FAIL")
"""States that pass where the job is started again."""
_REPEATED: Final = re.compile(r"(\d+)(?:\(x(\d+)\))?")


@dataclass(frozen=True, kw_only=True, slots=True)
class AllottedNode:
    """What a job has got of one node."""

    host: str
    cpus: int | None
    """How many cpus; None: Slurm did not tell."""
    tasks: int | None
    """How many tasks the job asked to have there; None: it did not ask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """The Slurm job this process runs in."""

    job: str
    nodes: tuple[AllottedNode, ...]
    here: str | None = None
    """The node this process is on; None: none of them."""
    restarts: int = 0
    """How often the job was requeued."""

    @property
    def hosts(self) -> Hostfile:
        """Its nodes as a hostfile: slots are the tasks asked for, and up to one for each cpu on demand."""
        entries = tuple(
            HostEntry(
                host=node.host, slots=node.tasks, max_slots=max(node.tasks, node.cpus or 0) if node.tasks else None
            )
            for node in self.nodes
        )
        return Hostfile(entries=entries, source=NODELIST)

    def cpus_of(self, host: str) -> int | None:
        """How many cpus the job has got on a host; None: not known."""
        return next((node.cpus for node in self.nodes if node.host == host), None)


def allocation(environ: Mapping[str, str]) -> Allocation | None:
    """The job these variables tell of; None: there is none.

    Raises:
        UserError: they cannot be understood.
    """
    job = environ.get(JOB)
    if job is None or NODELIST not in environ:
        return None
    if "SLURM_HET_SIZE" in environ:
        raise UserError(
            f'SLURM_HET_SIZE: a heterogeneous job: "{environ["SLURM_HET_SIZE"]}"; ask for nodes of one kind, or give '
            "--hosts localhost for this machine alone"
        )
    names = [entry.host for entry in parse_list(environ[NODELIST], NODELIST).entries]
    cpus = _per_node("SLURM_JOB_CPUS_PER_NODE", environ, len(names))
    tasks = _tasks(environ, len(names))
    nodes = [AllottedNode(host=h, cpus=c, tasks=t) for h, c, t in zip(names, cpus, tasks, strict=True)]
    restarts = _number("SLURM_RESTART_COUNT", environ, 0)
    return Allocation(job=job, nodes=tuple(nodes), here=environ.get("SLURMD_NODENAME"), restarts=restarts)


def _tasks(environ: Mapping[str, str], count: int) -> list[int | None]:
    """How many tasks the job asked to have on each node. Where srun started us it speaks of its own step instead."""
    name, text = "SLURM_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE")
    asked = "SLURM_NTASKS" in environ or "SLURM_NTASKS_PER_NODE" in environ
    of_step = STEP in environ and text is not None and len(_numbers(name, text)) != count
    return _per_node(name, environ, count) if asked and not of_step else [None] * count


def check_alone(environ: Mapping[str, str]) -> None:
    """Raises UserError where srun started this process many times: each would be a launcher of all nodes."""
    tasks = _number("SLURM_STEP_NUM_TASKS", environ, 1)
    if STEP in environ and tasks > 1:
        raise UserError(
            f'SLURM_STEP_NUM_TASKS: srun starts this launcher {tasks} times: "{tasks}"; start falcon-launch once, in '
            "the job script itself: it starts one agent on each node"
        )


def only(hosts: Hostfile, within: Allocation) -> Hostfile:
    """A hostfile as a filter: its hosts, each of which must be of the job.

    Raises:
        UserError: a host is not, or has a user name, which srun has no use for.
    """
    allotted = {entry.host: entry for entry in within.hosts.entries}
    short = {name.partition(".")[0]: entry for name, entry in allotted.items()}
    entries = []
    for entry in hosts.entries:
        found = allotted.get(entry.host) or short.get(entry.host.partition(".")[0])
        if found is None:
            known = ", ".join(list(allotted)[:8])
            raise UserError(
                f'{hosts.place_of(entry)}: not a node of job {within.job}: "{entry.host}"; its nodes are {known}; '
                "name some of them, or none"
            )
        if entry.user is not None:
            raise UserError(f'{hosts.place_of(entry)}: srun takes no user: "{entry.user}@{entry.host}"; leave it out')
        entries.append(_filtered(entry, found))
    return dataclasses.replace(hosts, entries=tuple(entries))


def _filtered(entry: HostEntry, found: HostEntry) -> HostEntry:
    """An entry of the filter with the job's own name and, where it says nothing of slots, the job's tasks."""
    if entry.slots is None and entry.max_slots is None:
        entry = dataclasses.replace(entry, slots=found.slots, max_slots=found.max_slots)
    return dataclasses.replace(entry, host=found.host)


def is_here_only(hosts: Hostfile) -> bool:
    """Whether this machine is asked for by its own name: no business of Slurm's."""
    return [entry.host for entry in hosts.entries] == [LOCAL]


def srun_words(hosts: Sequence[str], within: Allocation) -> tuple[str, ...]:
    """The one srun that starts an agent on each of these hosts, with all cpus the job has there.

    A number of cpus is asked for where it is the same everywhere: srun (22.05 and later) does not take it from the job.
    Where it differs no single number is right, and a step without one gets whatever the job has on each node.
    """
    counts = {within.cpus_of(host) for host in hosts}
    cpus = counts.pop() if len(counts) == 1 else None
    number = len(hosts)
    size = (f"--nodes={number}", f"--ntasks={number}", f"--nodelist={','.join(hosts)}")
    return (*SRUN, *size, *(() if cpus is None else (f"--cpus-per-task={cpus}",)))


def notes(within: Allocation, hosts: Sequence[str], facts: Sequence[HostFacts]) -> tuple[str, ...]:
    """What the user should know of what the agents see of the job's cpus."""
    names = [within.here if host == LOCAL and within.here else host for host in hosts]
    rows = ((name, within.cpus_of(name), len(one.topology.allowed)) for name, one in zip(names, facts, strict=True))
    return tuple(_cpu_note(name, allotted, seen) for name, allotted, seen in rows if allotted and seen != allotted)


def _cpu_note(host: str, allotted: int, seen: int) -> str:
    if seen < allotted:
        return (
            f"{host}: {seen} of the {allotted} cpus that the job has there can be used; --cpus-per-task was lost on "
            "the way (srun 22.05 and later do not take it from the job): start falcon-launch in the job script itself"
        )
    return f"{host}: {seen} cpus can be used, the job has {allotted} there: this Slurm does not confine jobs"


def _per_node(name: str, environ: Mapping[str, str], count: int) -> list[int | None]:
    """ "4(x2),2" -> 4 4 2; as many as there are nodes."""
    text = environ.get(name)
    if text is None:
        return [None] * count
    numbers = _numbers(name, text)
    if len(numbers) != count:
        raise UserError(f'{name}: for {len(numbers)} nodes, but {NODELIST} has {count}: "{text}"')
    return [*numbers]


def _numbers(name: str, text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        found = _REPEATED.fullmatch(part)
        if found is None:
            raise UserError(f'{name}: not a list of numbers as 4(x2),2: "{text}"')
        numbers += [int(found[1])] * int(found[2] or 1)
    return numbers


def _number(name: str, environ: Mapping[str, str], default: int) -> int:
    text = environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise UserError(f'{name}: must be a number: "{text}"')
    return int(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """How a job stands, as ``scontrol --oneliner show job`` tells."""

    name: str
    exit_code: int
    """As a shell counts; nothing is told before the end."""
    requeues: bool
    """Slurm starts it again when a node fails or something else needs its place."""
    nodes: str = ""
    reason: str = ""
    output: str = ""
    """Path of the file it writes to."""

    @classmethod
    def parse(cls, text: str) -> JobState:
        """Reads the first job that is told of.

        Raises:
            UserError: there is none.
        """
        values = dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(\S*)", text.split("\n", 1)[0]))
        if "JobState" not in values:
            raise UserError(f'scontrol: tells of no job: "{text[:80].strip()}"')
        code, _, number = values.get("ExitCode", "0:0").partition(":")
        name = values["JobState"]
        ended = int(code) or (128 + int(number) if int(number or 0) else 0)
        return cls(
            name=name,
            exit_code=ended or (0 if name in ("COMPLETED", *_NOT_ENDED) else EXIT_FAILED),
            requeues=values.get("Requeue") == "1",
            nodes="" if values.get("NodeList") == "(null)" else values.get("NodeList", ""),
            reason="" if values.get("Reason") == "None" else values.get("Reason", ""),
            output=values.get("StdOut", ""),
        )

    @property
    def is_final(self) -> bool:
        """Nothing more will come of it."""
        return self.name not in _NOT_ENDED and not (self.requeues and self.name in _REQUEUED)
