"""The run folder: ``runs/<run_id>/{config.json, plan.json, report.json, attempt_N/...}``."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from launcher import roster
from launcher.config import LaunchConfig
from launcher.errors import LaunchError, UserError
from launcher.hostfile import Hostfile
from launcher.plan import LaunchPlan, Site
from launcher.rundir import PLAN_FILE

if TYPE_CHECKING:  # a --dry-run has no report, and every import delays it
    from launcher.report import RunReport

RUNNING_FILE = "running.json"
_ATTEMPT: Final = re.compile(r"attempt_([0-9]+)")
NOT_NAMED = "<new>"
"""Run id of a dry run that was given none."""


def site_of(config: LaunchConfig, *, dry_run: bool) -> Site:
    """Where the next attempt of this run belongs; writes nothing.

    Raises:
        UserError: a new run is to have the name of one that exists.
    """
    run_id = config.launch.run_id or (NOT_NAMED if dry_run else _new_run_id())
    run_dir = Path(config.launch.runs_dir).absolute() / run_id
    if run_dir.exists() and not config.resume_from:
        raise UserError(f'--run-id: this run exists: "{run_dir}"; use --resume {run_id}, or another name')
    numbers = [int(found[1]) for p in run_dir.glob("attempt_*") if (found := _ATTEMPT.fullmatch(p.name))]
    return Site(run_id=run_id, attempt=max(numbers, default=0) + 1, run_dir=str(run_dir), cwd=str(Path.cwd()))


def config_text(config: LaunchConfig) -> str:
    """What ``config.json`` of a run holds, on every host."""
    return _text(config.to_json())


class Running:
    """For as long as the block lasts the run folder says who runs it, for ``falcon ps`` and ``falcon kill``."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._since = time.time()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def tell(self, plan: LaunchPlan, hosts: Hostfile) -> None:
        """Says so of this attempt, and after its end until the next one tells."""
        agents = [
            {"host": entry.host, "user": entry.user, "roster": node.roster, "ranks": len(node.ranks)}
            for entry, node in zip(hosts.entries, plan.nodes, strict=True)
        ]
        self._path = Path(plan.site.run_dir) / RUNNING_FILE
        values = {"launcher": asdict(roster.Process.this()), "since": self._since, "agents": agents}
        roster.write(self._path, values)


def create(config: LaunchConfig, plan: LaunchPlan) -> None:
    """Makes the folder of this attempt and writes what it was started from; readable by its owner only.

    Raises:
        UserError: the folder cannot be made.
    """
    attempt = Path(plan.site.attempt_dir)
    try:
        attempt.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        attempt.mkdir(mode=0o700)
        # The run's own config stays that of its first attempt: a resume that is refused must not change the run.
        _write(plan, "config.json", config.to_json(), keep_first=True)
        _write(plan, PLAN_FILE, plan.redacted().to_json())
    except OSError as fault:
        text = f'--runs-dir: cannot make the run folder: "{attempt}"; {fault.strerror}'
        # It could be made for the attempts before: a disk can be full, or away, for a while.
        raise (LaunchError if config.resume_from else UserError)(text) from fault


def keep_report(plan: LaunchPlan, report: RunReport) -> None:
    """Writes how the attempt ended.

    Raises:
        LaunchError: it cannot be written any more.
    """
    with _told(plan.site.run_dir):
        _write(plan, "report.json", report.to_json())


def keep_last_report(report: RunReport) -> None:
    """Writes how the run ended after all its attempts.

    Raises:
        LaunchError: it cannot be written any more.
    """
    with _told(report.run_dir):
        _put(Path(report.run_dir) / "report.json", _text(report.to_json()))


@contextlib.contextmanager
def _told(run_dir: str) -> Iterator[None]:
    try:
        yield
    except OSError as fault:
        text = f'the report cannot be written to "{run_dir}": {fault.strerror}; is the run folder gone?'
        raise LaunchError(text) from fault


def read_report(run: str, runs_dir: str) -> RunReport:
    """The report of a run given by its folder or its id.

    Raises:
        UserError: there is none that can be read.
    """
    from launcher.report import RunReport

    for path in (Path(run) / "report.json", Path(runs_dir) / run / "report.json"):
        try:
            if path.is_file():
                return RunReport.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise UserError(f'report: cannot be read: "{path}"; {fault!r}') from fault
    raise UserError(
        f'report: no such run, or it has not ended: "{run}"; give a run folder, or a run id below {runs_dir}'
    )


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1) + "\n"


def _new_run_id() -> str:
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{os.urandom(2).hex()}"


def _write(plan: LaunchPlan, name: str, values: dict[str, Any], *, keep_first: bool = False) -> None:
    """The newest (or first) at the top of the run folder, and each attempt's own beside its logs."""
    text = _text(values)
    for folder in (plan.site.attempt_dir, plan.site.run_dir):
        if keep_first and folder == plan.site.run_dir and (Path(folder) / name).exists():
            continue
        _put(Path(folder) / name, text)


def _put(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    partial.chmod(0o600)
    partial.rename(path)
