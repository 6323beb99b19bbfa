"""What can happen to an attempt, and what can be done about it: the words of ``decide``. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["rank", "prepare", "binding", "agent", "lost", "hang", "start", "interrupt", "yield"]
"""rank: it ended badly; agent: it could not do its part; lost: it is gone, or silent; start: no attempt came about;
yield: it made way for something else, as it was asked to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cause:
    """The first thing that ended the run before its time."""

    kind: Kind
    exit_code: int
    """The launcher's own exit code because of it."""
    rank: int | None = None
    """Whose fault it is, where that is known."""
    node_rank: int | None = None
    text: str = ""
    echo: bool = False
    """Likely the answer to a failure elsewhere, of which nothing was heard yet."""
    oom_kills: int = 0
    """Of a preparation: processes of its cgroup that the kernel killed for memory; of ranks see RankOutcome."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a process ended: exactly one of the two is set."""

    code: int | None = None
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """As a shell counts: 128 + n for signal n."""
        return 128 + self.signal if self.signal is not None else self.code or 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A node's preparation ended."""

    node_rank: int
    ended: Ended
    text: str = ""
    """Where, if there is more than one node."""
    echo: bool = False
    """Its last words are of node 0, from which it was to have something, that is gone."""
    oom_kills: int = 0
    """Processes of its cgroup that the kernel killed for memory in the meantime."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exited:
    """A rank ended."""

    rank: int
    ended: Ended
    echo: bool = False
    """Its last words are of a peer or a connection that is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mismatched:
    """A rank does not run where it was planned to."""

    rank: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Faulted:
    """An agent could not do what it was told."""

    node_rank: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lost:
    """An agent is gone, and its ranks with it."""

    node_rank: int
    text: str
    blamed: bool = True
    """Its host is at fault, as far as can be told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CanSave:
    """A rank can write an emergency checkpoint where the next attempt will find it."""

    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A rank has committed an emergency checkpoint."""

    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stalled:
    """No step came for too long."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """Stacks of a run that stalls are kept, as far as they could be had."""

    rank: int | None
    """Who keeps the others waiting, where that can be told."""
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interrupted:
    """The launcher got a signal that asks it to end."""

    signal: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CanStop:
    """The ranks can be asked to end after the step they are in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MakeWay:
    """The launcher got the signal that asks it to save and end, because its time will soon be over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimeUp:
    """The time set by the last SetTimer is over."""


Event = (
    Prepared
    | Exited
    | Mismatched
    | Faulted
    | Lost
    | CanSave
    | CanStop
    | Saved
    | Stalled
    | Traced
    | Interrupted
    | MakeWay
    | TimeUp
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRanks:
    """Tell every agent to start its ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalAll:
    """Tell every agent to send this signal to what it runs."""

    signal: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AskStacks:
    """Have every rank write down where it stands; answered by Traced, or by TimeUp where some do not answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AskSave:
    """Have this rank commit an emergency checkpoint."""

    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AskStop:
    """Have all ranks end after the step they are in, and save; rank 0 is asked, for they agree on the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetTimer:
    """Send TimeUp after so many seconds; takes the place of the timer before it."""

    seconds: float


Action = StartRanks | SignalAll | AskStacks | AskSave | AskStop | SetTimer
