"""The attempts of one run, one after the other, until one ends well or no further one makes sense."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable

from falcon_dist.config import TrainConfig
from falcon_dist.contract import EXIT_FAILED, EXIT_USER_ERROR
from launcher import ledger, render, retry
from launcher.config import LaunchConfig
from launcher.console import Console
from launcher.errors import HostError, Interruption, LaunchError
from launcher.events import Cause
from launcher.hostfile import Hostfile
from launcher.interrupts import cause_of, interruptible
from launcher.ledger import Entry
from launcher.report import RunReport, outcome_of
from launcher.retry import Again, Past, Policy

Attempt = Callable[[LaunchConfig, Hostfile], RunReport]
"""One start of the run, from asking the hosts to its end."""


class Series:
    """Attempts so far, and the next."""

    def __init__(self, config: LaunchConfig, hosts: Hostfile, attempt: Attempt, console: Console) -> None:
        self._config = config
        self._hosts = hosts
        self._attempt = attempt
        self._console = console
        self._policy = Policy(max_restarts=config.launch.max_restarts, min_nodes=config.launch.min_nodes)
        self._past: list[Past] = []
        self._entries: list[Entry] = []
        self._began = time.monotonic()

    def run(self) -> RunReport:
        """Makes attempts until there is nothing more to do; the last one's report, with all of them in it.

        Raises:
            UserError: what was asked for cannot be.
            LaunchError: a host did not do its part, and there was no attempt that could be reported.
            Interruption: a signal asked to end before there was one.
        """
        try:
            with interruptible():
                why = self._until_over()
        except Interruption as asked:
            if not self._entries:
                raise
            return self._interrupted(asked.signal)
        return self._report(why)

    def _until_over(self) -> str:
        """Makes the attempts; why there is no further one."""
        while True:
            began = time.monotonic()
            try:
                report = self._attempt(self._config, self._hosts)
                self._take(report, began)
            except (LaunchError, HostError) as fault:
                self._could_not_start(fault)
            except OSError as fault:
                if not self._entries:
                    raise
                # A disk that was there before can be away for a while.
                self._could_not_start(LaunchError(f'{fault.strerror or fault}: "{fault.filename or "a process"}"'))
            match retry.after(self._past, self._policy):
                case Again() as again:
                    self._prepare_next(again)
                case retry.Stop(why=why):
                    return why

    def _interrupted(self, number: int) -> RunReport:
        """The report of a run that a signal ended when none of its attempts could be stopped."""
        cause = cause_of(number)
        report = self._report(f"not started again: {render.signal_name(number)} came before the next attempt")
        return dataclasses.replace(
            report,
            outcome=outcome_of(cause),
            exit_code=cause.exit_code,
            cause=cause,
            interrupted=cause.kind == "interrupt",
        )

    def _take(self, report: RunReport, began: float) -> None:
        failure = render.failure_text(report)
        if failure:
            self._console.complain(failure)
        cause = failure.splitlines()[0] if failure else ""
        # The first attempt begins when the run does: hosts had to be asked.
        start = began if self._entries else self._began
        self._entries.append(Entry(report=report, cause=cause, began_s=start, ended_s=time.monotonic()))
        train = _pinned(self._config, len(report.ranks))
        past = past_of(report, self._hosts, self._best_step())
        # A program of somebody else divides its rows itself.
        shared = None if self._config.program else (train.loop.global_batch or 0) // train.loop.micro_batch
        self._past.append(dataclasses.replace(past, micro_batches=shared))
        self._config = dataclasses.replace(
            self._config,
            resume_from=report.run_dir,
            resume_step=max(self._config.resume_step, self._best_step()),
            made_step=self._best_step(),
            train=train,
            launch=dataclasses.replace(self._config.launch, run_id=report.run_id),
        )

    def _could_not_start(self, fault: LaunchError | HostError) -> None:
        if isinstance(fault, HostError) and not self._entries:  # nothing says that it ever was otherwise
            raise fault
        if not self._policy.max_restarts or (not self._entries and len(self._past) >= self._policy.max_restarts):
            raise fault
        self._console.complain(str(fault))
        cause = Cause(kind="start", exit_code=EXIT_FAILED, text=str(fault))
        hosts = tuple(entry.host for entry in self._hosts.entries)
        step = self._best_step()
        self._past.append(Past(cause=cause, hosts=hosts, failed_hosts=fault.hosts, checkpoint_step=step))

    def _best_step(self) -> int:
        return max((entry.report.checkpoint_step for entry in self._entries), default=0)

    def _prepare_next(self, again: Again) -> None:
        if again.without:
            failed = [host for host in again.without if host not in again.spare]
            self._console.say(f"without {', '.join(failed)} from now on: it failed twice")
        if again.spare:
            self._console.say(f"without {', '.join(again.spare)} too: a step's rows do not divide among more hosts")
        if again.without:
            kept = tuple(entry for entry in self._hosts.entries if entry.host in again.hosts)
            self._hosts = dataclasses.replace(self._hosts, entries=kept)
        number = len(self._past)
        self._console.say(f"restart {number} of {self._policy.max_restarts} in {again.delay_s:g} s")
        time.sleep(again.delay_s)

    def _report(self, why: str) -> RunReport:
        if not self._entries:
            raise LaunchError(self._past[-1].cause.text if self._past[-1].cause else "no attempt came about")
        if why:
            self._console.complain(why)
        last = self._entries[-1].report
        if self._past[-1].cause is not None and self._past[-1].cause.kind == "start":
            lost = last.cause is not None and last.cause.kind == "lost"
            last = dataclasses.replace(
                last, outcome="failed", exit_code=EXIT_FAILED, cause=self._past[-1].cause, lost_a_host=lost
            )
        return dataclasses.replace(
            last,
            attempts=ledger.lines(self._entries),
            ledger_s=ledger.seconds(self._entries),
            goodput=ledger.goodput(self._entries),
            ended_because=why,
            checkpoint=self._newest_checkpoint(),
        )

    def _newest_checkpoint(self) -> str | None:
        made = [e.report for e in self._entries if e.report.checkpoint]
        return max(made, key=lambda report: report.checkpoint_step).checkpoint if made else None


def _pinned(config: LaunchConfig, world_size: int) -> TrainConfig:
    """The settings with the number of rows a step written down: on fewer hosts it stays what it was."""
    loop = config.train.loop
    if loop.global_batch is not None:
        return config.train
    rows = loop.micro_batch * (loop.grad_accum or 1) * world_size
    return dataclasses.replace(config.train, loop=dataclasses.replace(loop, global_batch=rows, grad_accum=None))


def past_of(report: RunReport, hosts: Hostfile, checkpoint_step: int) -> Past:
    """What of an attempt matters to the next one."""
    cause, rank = report.cause, report.failed_rank
    failed: tuple[str, ...] = ()
    if cause is not None and cause.node_rank is not None:
        by_signal = rank is not None and cause.kind == "rank" and rank.signal is not None
        unprepared = cause.kind == "prepare" and cause.exit_code != EXIT_USER_ERROR
        if cause.kind in ("lost", "agent", "hang") or by_signal or unprepared:
            failed = (hosts.entries[cause.node_rank].host,)
    return Past(
        cause=cause,
        hosts=tuple(entry.host for entry in hosts.entries),
        failed_hosts=failed,
        checkpoint_step=checkpoint_step,
        ranks=Counter(outcome.host for outcome in report.ranks),
        out_of_memory=(rank is not None and rank.oom_kills > 0) or (cause is not None and cause.oom_kills > 0),
        interrupted=report.interrupted,
        asked_to_yield=report.asked_to_yield,
    )
