"""falcon-launch: flags -> configuration -> cluster -> placement -> plan -> run -> exit code. No logic of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import (
    backends,
    checks,
    command,
    discover,
    environment,
    explain,
    flags,
    folder,
    network,
    planner,
    render,
    sysfs,
)
from launcher import config as configuration
from launcher.cluster import Cluster, HostFacts, join
from launcher.config import LaunchConfig
from launcher.cpuset import CpuSet
from launcher.errors import Interruption, LaunchError, UserError
from launcher.flags import Order
from launcher.hostfile import Hostfile
from launcher.launchsettings import LaunchSettings
from launcher.patience import Patience
from launcher.placement import Policy, place
from launcher.plan import LaunchPlan
from launcher.planner import Opened
from launcher.reach import Reach, reach
from launcher.running import check_free
from launcher.topology import Topology

if TYPE_CHECKING:  # not for --help and --dry-run
    from launcher.console import Console
    from launcher.report import RunReport

TOKEN_BYTES = 16


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    return command.run("falcon-launch", lambda: launch(flags.parse(sys.argv[1:]), os.environ))


def launch(order: Order, environ: Mapping[str, str]) -> int:
    """Plans, and unless told to stop there, runs.

    Raises:
        UserError: what was asked for cannot be.
        LaunchError: a host did not do its part.
    """
    config = configuration.load(order.flags)
    if order.slurm:
        return _submit(order, config)
    way = reach(config.launch, environ)
    hosts = way.hosts
    saved = sysfs.load_for([entry.host for entry in hosts.entries], order.topologies)
    if order.dry_run and len(saved) == len(hosts.entries):
        facts = tuple(HostFacts(topology=saved[e.host], python=sys.executable, versions={}) for e in hosts.entries)
        return _show_plan(order, config, join(hosts, facts, _imagined(hosts)), environ)
    if order.dry_run:
        with discover.agents(hosts, way.transport) as agents:
            return _show_plan(order, config, join(hosts, discover.ask(agents, saved), _imagined(hosts)), environ)
    return _run(order, config, way, saved, environ)


def _run(
    order: Order, config: LaunchConfig, way: Reach, saved: Mapping[str, Topology], environ: Mapping[str, str]
) -> int:
    from launcher.console import Console
    from launcher.interrupts import cause_of
    from launcher.series import Series

    if config.resume_from:
        check_free(Path(config.resume_from))
    with Console(quiet=order.quiet or order.as_json) as console:
        running = folder.Running()

        def attempt(config: LaunchConfig, hosts: Hostfile) -> RunReport:
            with discover.agents(hosts, way.transport) as agents:
                start = _Start(order, config, way.to(hosts), agents, environ, console=console, running=running)
                return start.run(discover.ask(agents, saved))

        try:
            with running:
                report = Series(config, way.hosts, attempt, console).run()
        except Interruption as asked:  # while the first attempt still asks its hosts
            if cause_of(asked.signal).kind == "yield":
                _start_again(order, config, way, console)
            raise
        folder.keep_last_report(report)
        console.conclude(json.dumps(report.to_json()) if order.as_json else render.closing_text(report))
        if report.wants_requeue:
            _start_again(order, config, way, console)
    return report.exit_code


def _start_again(order: Order, config: LaunchConfig, way: Reach, console: Console) -> None:
    """Asks Slurm for that, where the run is on nodes of its job."""
    from launcher import batch

    job = way.allocation
    if job is None or not way.by_srun:
        return
    if order.flags.resume is None:
        console.say(f"job {job.job} is not started again: without --resume auto it would begin at the first step")
    else:
        batch.requeue(job, config.launch.max_requeues, console.say)


def _submit(order: Order, config: LaunchConfig) -> int:
    from launcher import batch, slurmjob
    from launcher.console import Console

    script = slurmjob.render(config, str(Path(sys.argv[0]).absolute()), order.job_words, order.program_words)
    if order.dry_run:
        sys.stdout.write(json.dumps({"script": script.text}) + "\n" if order.as_json else script.text)
        return 0
    with Console(quiet=order.quiet or order.as_json) as console:
        for note in script.notes:
            console.say(note)
        job = batch.submit(script.text)
        console.say(f"job {job} submitted; Ctrl-C cancels it")
        return batch.Follower(job, console.say).until_done()


def policy_of(settings: LaunchSettings) -> Policy:
    """How the settings want ranks placed.

    Raises:
        UserError: a list of cpus is none.
    """
    return Policy(
        nproc_per_node=settings.nproc_per_node,
        by_slots=settings.by_slots,
        per=settings.ranks_per,
        sockets=_list_of("--sockets", settings.sockets),
        numa_nodes=_list_of("--numa-nodes", settings.numa_nodes),
        cores_list=_list_of("--cores-list", settings.cores_list),
        ncores_per_rank=settings.ncores_per_rank,
        use_logical_cores=settings.use_logical_cores,
        comm_cores=settings.ccl_worker_count,
    )


def _list_of(flag: str, text: str | None) -> CpuSet | None:
    if text is None:
        return None
    try:
        return CpuSet.parse(text)
    except ValueError as fault:
        raise UserError(f"{flag}: {fault}") from None


def _imagined(hosts: Hostfile) -> network.Meeting:
    return network.alone() if len(hosts.entries) == 1 else network.unprobed(hosts)


def _plan(
    config: LaunchConfig, cluster: Cluster, environ: Mapping[str, str], opened: Opened, *, dry_run: bool
) -> LaunchPlan:
    placement = place(cluster, policy_of(config.launch))
    site = folder.site_of(config, dry_run=dry_run)
    text = folder.config_text(config)
    return planner.build(config, cluster, placement, site, environ, opened=opened, config_text=text)


def _show_plan(order: Order, config: LaunchConfig, cluster: Cluster, environ: Mapping[str, str]) -> int:
    planned = _plan(config, cluster, environ, Opened(), dry_run=True)
    if order.as_json:
        sys.stdout.write(json.dumps(render.plan_json(planned), indent=1) + "\n")
        if order.explain:
            sys.stderr.write("\n".join(_explained(config, cluster)[1:]) + "\n")
        return 0
    names = [item.partition("=")[0] for item in config.launch.env]
    notes = _notes(config, cluster, environ)
    explained = _explained(config, cluster) if order.explain else ()
    sys.stdout.write("\n".join([render.plan_text(planned, names), *explained, *notes]) + "\n")
    return 0


def _explained(config: LaunchConfig, cluster: Cluster) -> tuple[str, ...]:
    rows = explain.unused(cluster, policy_of(config.launch))
    return ("", render.table(("host", "cpus", "not used because"), rows) if rows else "every cpu is used")


def _notes(config: LaunchConfig, cluster: Cluster, environ: Mapping[str, str]) -> tuple[str, ...]:
    backend, why = backends.choose(config, cluster)
    chosen = (f"backend: {backend} ({why})",) if config.program is None else ()
    withheld = environment.withheld(environ, config.launch.env)
    kept_back = (f"not passed on to ranks: {', '.join(withheld)}; use --env NAME to pass one",) if withheld else ()
    return (*config.notes, *chosen, *kept_back)


class _Start:
    """A real run: from hosts that have answered to its end."""

    def __init__(
        self,
        order: Order,
        config: LaunchConfig,
        way: Reach,
        agents: discover.Agents,
        environ: Mapping[str, str],
        *,
        console: Console,
        running: folder.Running,
    ) -> None:
        self._running = running
        self._console = console
        self._order = order
        self._config = config
        self._way = way
        self._hosts = way.hosts
        self._agents = agents
        self._environ = environ

    def run(self, facts: tuple[HostFacts, ...]) -> RunReport:
        """Checks, meets, plans and runs one attempt to its end."""
        # What only a real run needs is not loaded for --help and --dry-run.
        from launcher.record import Record
        from launcher.run import Run

        config, order, hosts = self._config, self._order, self._hosts
        _plan(config, join(hosts, facts, _imagined(hosts)), self._environ, Opened(), dry_run=True)  # refused early
        check_notes = self._check(facts)
        meeting = discover.meet(self._agents, self._hosts)
        cluster = join(self._hosts, facts, meeting)
        planned = _plan(config, cluster, self._environ, self._open(cluster), dry_run=False)
        check_free(Path(planned.site.run_dir))  # once more: hosts took their time to answer
        folder.create(config, planned)
        console = self._console
        notes = (*_notes(config, cluster, self._environ), *self._way.notes(facts), *check_notes, *meeting.notes)
        for text in (f"run {planned.site.run_id}: {planned.site.run_dir}", *notes):
            console.say(text)
        show = console.complain if order.as_json else console.conclude  # standard output is the report's then
        if order.report_bindings:
            show(render.binding_table(planned))
        if order.explain:
            show("\n".join(_explained(config, cluster)))
        self._running.tell(planned, self._hosts)
        report = Run(planned, self._agents, console, Record(planned, notes), self._patience()).until_done()
        try:
            folder.keep_report(planned, report)
        except LaunchError as fault:  # it did run: what follows from how it ended, follows
            if config.launch.max_restarts:  # else it is the last report too, which ends the same way
                console.complain(str(fault))
        return report

    def _patience(self) -> Patience:
        launch = self._config.launch
        return Patience(
            hang_s=launch.hang_s, emergency_grace_s=launch.emergency_grace_s, stop_grace_s=launch.stop_grace_s
        )

    def _check(self, facts: tuple[HostFacts, ...]) -> tuple[str, ...]:
        program = self._config.program
        script = program.argv[0] if program is not None and not program.module else None
        site = folder.site_of(self._config, dry_run=True)
        surveys = discover.survey(self._agents, cwd=site.cwd, script=script, run_dir=site.run_dir)
        hosts = [entry.host for entry in self._hosts.entries]
        older = checks.older_checkpoints(
            hosts[0], surveys[0]["newest_step"], self._config.resume_step, self._config.made_step, site.run_dir
        )
        notes = checks.judge(hosts, facts, surveys, site.cwd, program)
        return (*older, *notes, *checks.clock_notes(hosts, discover.clock_offsets(self._agents)))

    def _open(self, cluster: Cluster) -> Opened:
        courier = planner.needs_courier(self._config, len(cluster.nodes))
        port, courier_port = discover.open_store(self._agents, cluster.addr, courier=courier)
        return Opened(port=port, courier_port=courier_port, courier_token=os.urandom(TOKEN_BYTES).hex())


if __name__ == "__main__":
    sys.exit(main())
