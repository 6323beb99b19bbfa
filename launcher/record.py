"""What has been heard of a run so far, and the report it makes. Knows no clock: times are handed in."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from falcon_dist.contract import PEER_IS_GONE, PREPARING_FAULT, RankResult
from launcher.events import Cause, Ended
from launcher.plan import LaunchPlan, RankPlan
from launcher.report import RankOutcome, RunReport, outcome_of


@dataclass(slots=True)
class Heard:
    """What one rank and its agent have told."""

    observed_cpus: str | None = None
    bound_cpus: str | None = None
    bound_threads: int | None = None
    ended: Ended = field(default_factory=Ended)
    stderr_tail: tuple[str, ...] = ()
    result: RankResult | None = None
    oom_kills: int = 0
    rss_bytes: int = 0
    last_step: int = 0


class Record:
    """Grows with every event of an attempt."""

    def __init__(self, plan: LaunchPlan, notes: tuple[str, ...]) -> None:
        self._plan = plan
        self._heard: dict[int, Heard] = defaultdict(Heard)
        self._notes = list(notes)
        self._phases: list[tuple[str, float]] = []
        self.summary: tuple[str, ...] = ()
        self.prepare_tail: tuple[str, ...] = ()
        self._tail_echoes = False
        self.checkpoint: str | None = None
        self.checkpoint_step = 0
        self.first_step: int | None = None
        self.last_step = 0
        self.step_s: float | None = None
        self.apart: set[int] = set()
        """Nodes that do not see this run folder."""

    def plan_of(self, rank: int) -> RankPlan:
        """The plan of a rank."""
        return self._plan.ranks[rank]

    def stepped(self, rank: int, step: int) -> None:
        """A rank has finished a step."""
        self._heard[rank].last_step = step
        self.first_step = step if self.first_step is None else min(step, self.first_step)
        self.last_step = max(step, self.last_step)

    def last_step_of(self, rank: int) -> int:
        """The last step a rank has finished in this attempt; 0: none."""
        return self._heard[rank].last_step

    def committed(self, path: str, step: int) -> None:
        """A checkpoint is whole; an older one that is told late changes nothing."""
        if step >= self.checkpoint_step:
            self.checkpoint, self.checkpoint_step = path, step

    def is_found_again(self, node_rank: int) -> bool:
        """Whether what this node writes into the run folder is there for node 0 of the next attempt."""
        return node_rank == 0 or not self.apart & {0, node_rank}

    def note(self, text: str) -> None:
        """Something the reader of the report should know."""
        self._notes.append(text)

    def enter(self, phase: str, now_s: float) -> None:
        """A phase begins, and the one before it ends."""
        self._phases.append((phase, now_s))

    def spawned(self, rank: int, cpus: str | None) -> str | None:
        """The agent has started a rank; returns how its binding differs from the plan, or None."""
        self._heard[rank].observed_cpus = cpus
        planned = str(self._plan.ranks[rank].binding.cpus)
        return None if cpus in (planned, None) else f'planned cpus "{planned}", the kernel has "{cpus}"'

    def bound(self, rank: int, told: Mapping[str, Any]) -> str | None:
        """A rank has told what it sees of its binding; returns how that differs from the plan, or None."""
        heard, planned = self._heard[rank], self._plan.ranks[rank].binding
        heard.bound_cpus, heard.bound_threads = told.get("cpus"), told.get("threads")
        if heard.bound_cpus not in (str(planned.cpus), None):
            return f'planned cpus "{planned.cpus}", the rank sees "{heard.bound_cpus}"'
        if heard.bound_threads not in (planned.threads, None):
            return f"planned {planned.threads} threads, the rank uses {heard.bound_threads}"
        return None

    def exited(self, rank: int, told: Mapping[str, Any]) -> Ended:
        """A rank has ended."""
        heard = self._heard[rank]
        heard.ended = Ended(code=told["code"], signal=told["signal"])
        heard.stderr_tail = tuple(told["tail"])
        heard.result = RankResult(**told["result"]) if told["result"] else None
        heard.oom_kills, heard.rss_bytes = told["oom_kills"], told["rss_bytes"]
        return heard.ended

    def is_echo(self, rank: int) -> bool:
        """Whether the last words of a rank are of a peer or a connection that is gone."""
        heard = self._heard[rank]
        return heard.ended.signal is None and _is_of_a_peer(heard.stderr_tail)

    def prepared(self, ended: Ended, tail: tuple[str, ...]) -> bool:
        """A node's preparation has ended; whether badly, and only because whom it sends to or hears from is gone."""
        echo = bool(ended.exit_code) and _is_of_a_peer([line for line in tail if line.startswith(PREPARING_FAULT)])
        if ended.exit_code and (not self.prepare_tail or (self._tail_echoes and not echo)):
            self.prepare_tail, self._tail_echoes = tail, echo
        return echo

    def main_told(self, told: Mapping[str, Any], now_s: float) -> None:
        """Rank 0 has told something of the whole run."""
        match told:
            case {"event": "phase", "name": str(name)}:
                self.enter(name, now_s)
            case {"event": "summary", "lines": list(lines)}:
                self.summary = tuple(map(str, lines))

    def report(
        self, cause: Cause | None, now_s: float, *, interrupted: bool = False, asked_to_yield: bool = False
    ) -> RunReport:
        """The report as of now."""
        site = self._plan.site
        return RunReport(
            run_id=site.run_id,
            attempt=site.attempt,
            run_dir=site.run_dir,
            outcome=outcome_of(cause),
            exit_code=cause.exit_code if cause else 0,
            cause=cause,
            interrupted=interrupted,
            asked_to_yield=asked_to_yield,
            ranks=tuple(self._outcome(node.host, rank) for node in self._plan.nodes for rank in node.ranks),
            timings_s=self._timings(now_s),
            notes=tuple(self._notes),
            prepare_tail=self.prepare_tail,
            summary=self.summary,
            checkpoint=self.checkpoint,
            checkpoint_step=self.checkpoint_step,
            first_step=self.first_step,
            last_step=self.last_step,
            step_s=self.step_s,
        )

    def _timings(self, now_s: float) -> dict[str, float]:
        ends = [begin for _, begin in self._phases[1:]] + [now_s]
        timings: dict[str, float] = defaultdict(float)
        for (name, begin), end in zip(self._phases, ends, strict=True):
            timings[name] += round(end - begin, 3)
        return dict(timings)

    def _outcome(self, host: str, rank: RankPlan) -> RankOutcome:
        heard = self._heard[rank.rank]
        return RankOutcome(
            rank=rank.rank,
            local_rank=rank.local_rank,
            host=host,
            rank_dir=rank.rank_dir,
            planned_cpus=str(rank.binding.cpus),
            planned_threads=rank.binding.threads,
            observed_cpus=heard.observed_cpus,
            bound_cpus=heard.bound_cpus,
            bound_threads=heard.bound_threads,
            **dataclasses.asdict(heard.ended),
            stderr_tail=heard.stderr_tail,
            result=heard.result,
            oom_kills=heard.oom_kills,
            rss_bytes=heard.rss_bytes,
            last_step=heard.last_step,
        )


def _is_of_a_peer(tail: Sequence[str]) -> bool:
    return any(sign in line for line in tail for sign in PEER_IS_GONE)
