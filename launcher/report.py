"""RunReport: how a run ended, rank by rank, and why; JSON in and out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from falcon_dist.contract import NOT_RETRIED, RankResult
from launcher.events import Cause

Outcome = Literal["ok", "failed", "interrupted", "stopped"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankOutcome:
    """One rank's end."""

    rank: int
    local_rank: int
    host: str
    rank_dir: str
    planned_cpus: str
    planned_threads: int
    observed_cpus: str | None = None
    """Affinity mask after exec, read by the agent; None: never started."""
    bound_cpus: str | None = None
    """Affinity mask the rank itself saw once torch was there; None: it did not tell."""
    bound_threads: int | None = None
    code: int | None = None
    signal: int | None = None
    """Both None: it never started, or was lost with its agent."""
    stderr_tail: tuple[str, ...] = ()
    result: RankResult | None = None
    oom_kills: int = 0
    """Processes of its cgroup that the kernel killed for memory at its end."""
    rss_bytes: int = 0
    """The most memory it had, with what it started and waited for; 0: not known."""
    last_step: int = 0

    @property
    def ok(self) -> bool:
        """It ended by itself with exit code 0."""
        return self.code == 0

    @property
    def as_planned(self) -> bool | None:
        """Whether it ran where it was planned to; None: not observed."""
        seen = [c for c in (self.observed_cpus, self.bound_cpus) if c is not None]
        return all(c == self.planned_cpus for c in seen) if seen else None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptLine:
    """One attempt among those of its run."""

    attempt: int
    outcome: Outcome
    exit_code: int
    cause: str
    """In one line; empty: it ended well."""
    hosts: tuple[str, ...]
    first_step: int | None
    """None: it did none."""
    last_step: int
    checkpoint_step: int
    """Step of the newest checkpoint it committed; 0: none."""
    steps_lost: int
    """Steps it finished that had to be done again."""
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """How a run ended: its last attempt in full, the others in a line each."""

    run_id: str
    attempt: int
    run_dir: str
    outcome: Outcome
    exit_code: int
    """The launcher's exit code."""
    cause: Cause | None
    """The first failure; None: there was none."""
    ranks: tuple[RankOutcome, ...]
    timings_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each phase, in order."""
    notes: tuple[str, ...] = ()
    prepare_tail: tuple[str, ...] = ()
    """Last stderr lines of a preparation that failed."""
    summary: tuple[str, ...] = ()
    """Rank 0's closing lines."""
    checkpoint: str | None = None
    """Newest checkpoint committed in this attempt."""
    checkpoint_step: int = 0
    first_step: int | None = None
    last_step: int = 0
    step_s: float | None = None
    """Seconds of a usual step; None: not known."""
    interrupted: bool = False
    """A signal asked the launcher to end, be it after the first failure."""
    asked_to_yield: bool = False
    """A signal asked it to make way, whatever came of that."""
    lost_a_host: bool = False
    """The last attempt that ran lost one, and no further attempt came about."""
    attempts: tuple[AttemptLine, ...] = ()
    ledger_s: Mapping[str, float] = field(default_factory=dict)
    """Where the time of all attempts went."""
    goodput: float | None = None
    """Usual seconds of the steps that were kept, over all the time that passed."""
    ended_because: str = ""
    """Why no further attempt was made; empty: none was allowed or needed."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunReport:
        """The inverse of to_json.

        Raises:
            KeyError, TypeError: the values are no report.
        """
        cause = Cause(**values["cause"]) if values["cause"] else None
        ranks = tuple(_rank(r) for r in values["ranks"])
        texts = {k: tuple(values[k]) for k in ("notes", "prepare_tail", "summary")}
        attempts = tuple(AttemptLine(**{**a, "hosts": tuple(a["hosts"])}) for a in values.get("attempts", ()))
        return cls(**{**values, **texts, "cause": cause, "ranks": ranks, "attempts": attempts})

    @property
    def wants_requeue(self) -> bool:
        """Whether Slurm should start the job again: it was to make way, or lost a node, of which Slurm hears later."""
        if self.cause is None or self.interrupted or self.cause.kind == "interrupt":
            return False
        asked = self.asked_to_yield and self.cause.exit_code not in NOT_RETRIED
        return self.cause.kind in ("yield", "lost") or self.lost_a_host or asked

    @property
    def failed_rank(self) -> RankOutcome | None:
        """The rank that failed first, where a rank is the cause."""
        return self.ranks[self.cause.rank] if self.cause and self.cause.rank is not None else None


def outcome_of(cause: Cause | None) -> Outcome:
    """How a run with this first cause is called."""
    if cause is None:
        return "ok"
    names: Mapping[str, Outcome] = {"interrupt": "interrupted", "yield": "stopped"}
    return names.get(cause.kind, "failed")


def _rank(values: Mapping[str, Any]) -> RankOutcome:
    result = RankResult(**values["result"]) if values["result"] else None
    return RankOutcome(**{**values, "stderr_tail": tuple(values["stderr_tail"]), "result": result})
