"""Which hosts a run has, and how agents are started on them: this machine, ssh, or the Slurm job we are in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import slurm, transport
from launcher.cluster import HostFacts
from launcher.errors import UserError
from launcher.hostfile import Hostfile, parse, parse_list, this_machine
from launcher.hostselect import select
from launcher.launchsettings import LaunchSettings

if TYPE_CHECKING:
    from launcher.slurm import Allocation
    from launcher.transport import Transport


@dataclass(frozen=True, kw_only=True, slots=True)
class Reach:
    """Hosts, and the way to them."""

    hosts: Hostfile
    allocation: Allocation | None = None
    """The Slurm job this process is in; None: there is none."""
    by_srun: bool = False
    """The hosts are nodes of that job."""

    @property
    def transport(self) -> Transport:
        """Starts their agents."""
        if self.allocation is None or not self.by_srun:
            return transport.start
        from launcher import trunk  # threads: elsewhere nobody waits for them to load

        return trunk.within(self.allocation)

    def to(self, hosts: Hostfile) -> Reach:
        """The same way to other hosts."""
        return dataclasses.replace(self, hosts=hosts)

    def notes(self, facts: Sequence[HostFacts]) -> tuple[str, ...]:
        """What the user should know of the job's cpus."""
        if self.allocation is None:
            return ()
        return slurm.notes(self.allocation, [entry.host for entry in self.hosts.entries], facts)


def reach(settings: LaunchSettings, environ: Mapping[str, str]) -> Reach:
    """The hosts of a run: those that were named, else those of the Slurm job we are in, else this machine.

    Raises:
        UserError: a hostfile is missing or cannot be understood, names what is not of the job, or nothing is left.
    """
    named = _named(settings)
    here_only = named is not None and slurm.is_here_only(named)
    allocation = _job(environ, needed=not here_only)
    by_srun = allocation is not None and not here_only
    if allocation is None or not by_srun:
        hosts = named or this_machine()
    else:
        slurm.check_alone(environ)
        hosts = slurm.only(named, allocation) if named else allocation.hosts
    chosen = select(
        hosts,
        include=settings.include,
        exclude=settings.exclude,
        nnodes=settings.nnodes,
        min_nodes=settings.min_nodes,
    )
    return Reach(hosts=chosen, allocation=allocation, by_srun=by_srun)


def _job(environ: Mapping[str, str], *, needed: bool) -> Allocation | None:
    try:
        return slurm.allocation(environ)
    except UserError:
        if needed:
            raise
        return None  # a run on this machine alone takes nothing of it


def _named(settings: LaunchSettings) -> Hostfile | None:
    if settings.hostfile is not None:
        return parse(_read(settings.hostfile), settings.hostfile)
    return parse_list(settings.hosts) if settings.hosts is not None else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as fault:
        raise UserError(f'--hostfile: cannot be read: "{path}"; {fault.strerror}') from fault
    except UnicodeDecodeError as fault:
        raise UserError(f'--hostfile: not a text file: "{path}"; give one host a line') from fault
