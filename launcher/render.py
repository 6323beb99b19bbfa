"""Plan, progress and report as text or JSON values. Pure."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from falcon_dist.contract import EXIT_USER_ERROR, STACKS_FILE
from launcher.network import NOT_PROBED
from launcher.plan import LaunchPlan, NodePlan, RankPlan
from launcher.redaction import redact

if TYPE_CHECKING:  # a --dry-run has no report, and every import delays it
    from launcher.report import RankOutcome, RunReport

NOTABLE: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GLOO_SOCKET_IFNAME", "FALCON_BACKEND", "HF_TOKEN")
SIGNALS: Final = {1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE"} | {
    9: "SIGKILL",
    10: "SIGUSR1",
    11: "SIGSEGV",
    13: "SIGPIPE",
    15: "SIGTERM",
}


def plan_json(plan: LaunchPlan) -> dict[str, Any]:
    """The plan in the documented shape of ``--dry-run --json``, secrets struck out."""
    nodes = [{"host": n.host, "node_rank": n.node_rank, "ranks": [_rank_json(r) for r in n.ranks]} for n in plan.nodes]
    return {"nodes": nodes}


def _rank_json(rank: RankPlan) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "local_rank": rank.local_rank,
        "cpus": str(rank.binding.cpus),
        "comm_cpus": str(rank.binding.comm_cpus),
        "mem_nodes": str(rank.binding.mem_nodes),
        "threads": rank.binding.threads,
        "argv": list(rank.argv),
        "env": redact(rank.env),
    }


def plan_text(plan: LaunchPlan, asked: Sequence[str] = ()) -> str:
    """The plan for a reader; ``asked``: further variables to show."""
    first = plan.ranks[0]
    port = NOT_PROBED if plan.rendezvous.port is None else str(plan.rendezvous.port)
    keeper = "rank 0" if plan.rendezvous.served_by == "rank" else "the agent of node 0"
    env = redact(first.env)
    shown = [f"{name}={shlex.quote(env[name])}" for name in (*NOTABLE, *asked) if name in env]
    lines = [
        binding_table(plan),
        "",
        f"command     {shlex.join(first.argv)}",
        f"rendezvous  {plan.rendezvous.addr}:{port}, store kept by {keeper}",
        f"backend     {plan.backend}",
        f"env         {' '.join(shown)} (rank 0; all of it: --dry-run --json)",
        f"run folder  {plan.site.run_dir}",
    ]
    if prepare := plan.nodes[0].prepare:
        lines.insert(2, f"prepare     {shlex.join(prepare[0].argv)} (once, before any rank; handed to all hosts)")
    return "\n".join(lines)


def binding_table(plan: LaunchPlan) -> str:
    """Every rank's host and cores; those kept free for communication where there are any."""
    head: tuple[str, ...] = ("host", "rank", "local_rank", "cpus", "numa", "threads")
    rows = [_row(node, rank) for node in plan.nodes for rank in node.ranks]
    if any(rank.binding.comm_cpus for rank in plan.ranks):
        head += ("comm cpus",)
        rows = [(*row, str(rank.binding.comm_cpus)) for row, rank in zip(rows, plan.ranks, strict=True)]
    return table(head, rows)


def _row(node: NodePlan, rank: RankPlan) -> tuple[str, ...]:
    b = rank.binding
    return (node.host, str(rank.rank), str(rank.local_rank), str(b.cpus), str(b.mem_nodes) or "-", str(b.threads))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    return "\n".join(lines)


def step_line(event: Mapping[str, Any]) -> str:
    """A finished step, for the log: ``step 20/100  loss 2.31  learning_rate 1.9e-05 ...``."""
    parts = [f"step {event.get('step', '?')}{_of(event)}"]
    if "loss" in event:
        parts.append(f"loss {event['loss']:.4g}")
    if "lr" in event:
        parts.append(f"learning_rate {event['lr']:.3g}")
    if "epoch" in event:
        parts.append(f"epoch {event['epoch']:.2f}")
    return "  ".join(parts + _speed(event))


def progress_line(event: Mapping[str, Any]) -> str:
    """A finished step, for the one line that is written over: with the share done."""
    total = event.get("total")
    share = f" {100 * event['step'] / total:3.0f}%" if total and "step" in event else ""
    loss = [f"loss {event['loss']:.4g}"] if "loss" in event else []
    return "  ".join([f"step {event.get('step', '?')}{_of(event)}{share}", *loss, *_speed(event)])


def _of(event: Mapping[str, Any]) -> str:
    return f"/{event['total']}" if event.get("total") else ""


def _speed(event: Mapping[str, Any]) -> list[str]:
    parts = []
    if event.get("tokens_per_s") is not None:
        parts.append(f"{event['tokens_per_s']:.0f} tokens/s")
    if event.get("gemm_share") is not None:
        parts.append(f"{event['gemm_share']:.0%} of GEMM peak")
    if event.get("eta_s") is not None:
        parts.append(f"eta {duration(event['eta_s'])}")
    return parts


def duration(seconds: float) -> str:
    """62 -> "1:02", 3723 -> "1:02:03"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def output_line(rank: int | None, line: str) -> str:
    """A line a process wrote, with who wrote it; of a progress bar only its last state."""
    who = "prepare" if rank is None else f"rank {rank}"
    return f"[{who}] {line.rstrip().rpartition(chr(13))[2]}"


def failure_text(report: RunReport) -> str:
    """What went wrong first, its evidence, and how the others ended; empty for a run that went well."""
    if report.cause is None:
        return ""
    others = _others(report)
    return "\n".join([*_cause_lines(report), *([others] if others else [])])


def _cause_lines(report: RunReport) -> list[str]:
    cause, rank = report.cause, report.failed_rank
    if cause is None:
        return []
    if cause.kind == "interrupt":
        return [f"interrupted by {signal_name(cause.exit_code - 128)}; run folder {report.run_dir}"]
    if cause.kind == "prepare":
        where = f" on {cause.text}" if cause.text else ""
        code = cause.exit_code
        memory = f"out of memory, cgroup oom_kill +{cause.oom_kills}, " if cause.oom_kills else ""
        return [f"preparing failed{where}: {memory}exit code {code}", *_indented(report.prepare_tail, code)]
    if rank is None or cause.kind == "hang":
        stacks = f"  stacks: {report.run_dir}/attempt_{report.attempt}/rank_*/{STACKS_FILE}"
        traced = cause.kind == "hang" and any(one.observed_cpus for one in report.ranks)
        return [cause.text, *([stacks] if traced else [])]
    seat = f"rank {rank.rank} (local_rank {rank.local_rank}, host {rank.host})"
    if cause.kind == "binding":
        return [f"{seat} is not bound as planned: {cause.text}"]
    log = f"{rank.rank_dir}/stderr"
    return [f"{seat} failed first: {_circumstances(rank)}", *_indented(rank.stderr_tail, rank.code), f"  log: {log}"]


def _circumstances(rank: RankOutcome) -> str:
    """ "SIGKILL, cgroup oom_kill +1, peak memory 61.0 GiB, last step 412"."""
    parts = [how_ended(rank)]
    if rank.oom_kills:
        parts = [f"out of memory, {how_ended(rank)}"]
        parts += [f"cgroup oom_kill +{rank.oom_kills}", f"peak memory {rank.rss_bytes / (1 << 30):.1f} GiB"]
    return ", ".join([*parts, *([f"last step {rank.last_step}"] if rank.last_step else [])])


def _indented(tail: Sequence[str], code: int | None) -> list[str]:
    # A refused input has said all in its last line.
    return [f"  {line}" for line in (tail[-1:] if code == EXIT_USER_ERROR else tail)]


def _others(report: RunReport) -> str:
    started = [r for r in report.ranks if r is not report.failed_rank and r.observed_cpus]
    counts = Counter(how_ended(rank) for rank in started)
    who = "other ranks" if report.failed_rank else "ranks"
    return f"{who}: " + ", ".join(f"{n} {how}" for how, n in counts.items()) if counts else ""


def how_ended(rank: RankOutcome) -> str:
    """ "exit code 3", "SIGKILL", "never started" or "lost"."""
    if rank.signal is not None:
        return signal_name(rank.signal)
    if rank.code is not None:
        return f"exit code {rank.code}"
    return "lost" if rank.observed_cpus else "never started"


def signal_name(number: int) -> str:
    """15 -> "SIGTERM"."""
    return SIGNALS.get(number, f"signal {number}")


def closing_text(report: RunReport) -> str:
    """The last lines of a run."""
    lines = [*report.summary, f"{_outcome_line(report)}"]
    if report.timings_s:
        lines.append("time: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.timings_s.items()))
    lines += _attempt_lines(report)
    lines += _binding_lines(report.ranks)
    if report.checkpoint and not any(report.checkpoint in line for line in report.summary):
        lines.append(f"checkpoint: {report.checkpoint}")
    return "\n".join([*lines, f"run folder: {report.run_dir}"])


def _attempt_lines(report: RunReport) -> list[str]:
    """All attempts and where their time went, where there was more than one."""
    if len(report.attempts) < 2:
        return []
    head = ("attempt", "outcome", "steps", "checkpoint", "steps lost", "seconds", "cause")
    rows = [
        (
            *(str(a.attempt), a.outcome, f"{a.first_step}-{a.last_step}" if a.first_step else "-"),
            *(str(a.checkpoint_step or "-"), str(a.steps_lost), f"{a.seconds:.1f}", a.cause),
        )
        for a in report.attempts
    ]
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.ledger_s.items())
    goodput = (
        [] if report.goodput is None else [f"goodput: {100 * report.goodput:.1f}% of the time went into kept steps"]
    )
    return [table(head, rows), f"all attempts: {spent}", *goodput]


def _outcome_line(report: RunReport) -> str:
    ranks = f"{len(report.ranks)} rank{'s' if len(report.ranks) != 1 else ''}"
    steps = f", last step {report.last_step}" if report.last_step else ""
    return f"outcome: {report.outcome}, exit code {report.exit_code}, {ranks}{steps}"


def _binding_lines(ranks: Sequence[RankOutcome]) -> list[str]:
    odd = [r for r in ranks if r.as_planned is False]
    seen = [r for r in ranks if r.as_planned is not None]
    if odd:
        rows = [(str(r.rank), r.planned_cpus, r.observed_cpus or "-", r.bound_cpus or "-") for r in odd]
        return [table(("rank", "planned cpus", "kernel's", "rank's own"), rows)]
    if not seen:
        return []
    return [f"bindings: as planned on {'all' if len(seen) == len(ranks) else len(seen)} ranks ({_folded(seen)})"]


def _folded(ranks: Sequence[RankOutcome], most: int = 4) -> str:
    shown = [f"rank {r.rank}: cpus {r.planned_cpus}" for r in ranks[:most]]
    return ", ".join(shown) + (", ..." if len(ranks) > most else "")
