"""What has to be true after a fault; every way of ending has its check, and each makes the row's figures."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from chaos.bed import STEPS, Bed
from chaos.job import Job
from chaos.table import Found
from falcon_dist import checkpoint

CRASH_S = 1.0
"""A rank or agent that died is noticed within this."""
SILENT_S = 15.0
"""A host or link that is silent is noticed within this."""
AGAIN_S = 30.0
"""Training goes on within this, plus what the first start took."""
DOWN_S = 10.0
"""Everything is down within this after a fault that ends the run, once a survivor has saved."""


def again(
    bed: Bed,
    job: Job,
    named: str,
    *,
    within: float = CRASH_S,
    lost: int = 0,
    slack_s: float = 0.0,
    reference: bool = True,
) -> Found:
    """The run notices, starts again, ends well and has the weights of the undisturbed one."""
    again_s = job.first_step_again()
    code = job.end()
    noticed, wrong = job.noticed(), []
    detected = noticed.at - job.injected_at if noticed else None
    cause = cause_line(job) or (noticed.text if noticed else "")
    if detected is None or detected > within:
        wrong.append(f"noticed after {detected and round(detected, 1)} s, not within {within:g} s")
    if not re.search(named, job.text()):
        wrong.append(f'nothing said of "{named}"')
    if again_s is None:
        wrong.append("did not train again")
    elif again_s > AGAIN_S + bed.start_s + slack_s:
        wrong.append(f"trained again after {again_s:.0f} s only")
    steps_lost = job.steps_lost()
    if steps_lost is None or steps_lost > lost:
        wrong.append(f"{steps_lost} steps lost, {lost} allowed")
    wrong += ends_well(bed, job, code, reference=reference)
    return Found(
        detected_s=detected,
        cause=cause,
        again_s=again_s,
        steps_lost=steps_lost,
        orphans=bed.count_orphans(),
        exit_code=code,
        wrong=tuple(wrong),
    )


def ends_well(bed: Bed, job: Job, code: int, *, reference: bool = True) -> list[str]:
    """Exit code 0 and, where the same ranks trained to the end, the very same weights."""
    if code:
        return [f"exit code {code}: {last_words(job)}"]
    weights = bed.weights(job.run)
    if not weights:
        return [f"exit code 0 without a checkpoint of step {STEPS}"]
    if fault := checkpoint.fault_of(job.run / f"checkpoints/step-{STEPS:06d}"):
        return [f"the last checkpoint: {fault}"]
    return ["exit code 0 and other weights"] if reference and weights != bed.reference else []


def unharmed(bed: Bed, job: Job, named: str = "", *, reference: bool = True) -> Found:
    """The run goes on as if nothing had happened: one attempt, the same weights; ``named`` is said where given."""
    code = job.end()
    wrong = ends_well(bed, job, code, reference=reference)
    line = job.first_line(named) if named else None
    if named and line is None:
        wrong.append(f'nothing said of "{named}"')
    if (noticed := job.noticed()) is not None:
        wrong.append(f"a false alarm: {noticed.text}")
    if len(job.report().get("attempts") or [1]) != 1:
        wrong.append("it was started again")
    return Found(
        detected_s=line.at - job.injected_at if line else None,
        cause=line.text if line else "",
        steps_lost=job.steps_lost() or 0,
        orphans=bed.count_orphans(),
        exit_code=code,
        wrong=tuple(wrong),
    )


def stopped(bed: Bed, job: Job, named: str, codes: tuple[int, ...], *, within: float = CRASH_S) -> Found:
    """The run ends with one of these exit codes and says why; what it had saved is whole."""
    code = job.end()
    line = job.first_line(named, after=job.began)
    noticed = job.noticed() or line
    detected = noticed.at - job.injected_at if noticed else None
    wrong = [] if line else [f'nothing said of "{named}": {last_words(job)}']
    if detected is not None and detected > within:
        wrong.append(f"noticed after {detected:.1f} s, not within {within:g} s")
    if code not in codes:
        wrong.append(f"exit code {code}, not one of {codes}")
    wrong += [*traceback_of(job), *damaged(job.run / "checkpoints")]
    return Found(
        detected_s=detected,
        cause=line.text.removeprefix("noticed: ") if line else "",
        orphans=bed.count_orphans(),
        exit_code=code,
        wrong=tuple(wrong),
    )


def refused(bed: Bed, job: Job, named: str, codes: tuple[int, ...] = (2,), *, within: float = 20.0) -> Found:
    """Bad input: said in a line before any rank trains."""
    found = stopped(bed, job, named, codes, within=within)
    trained = ("it trained all the same",) if job.steps() else ()
    return merge(found, trained)


def merge(found: Found, wrong: list[str] | tuple[str, ...]) -> Found:
    """The same with more that is wrong."""
    return dataclasses.replace(found, wrong=(*found.wrong, *wrong))


def damaged(root: Path) -> list[str]:
    """Committed checkpoints that do not verify."""
    whole = [path for path in root.glob("step-*") if path.suffix == ""] if root.is_dir() else []
    return [f"{path.name}: {fault}" for path in whole if (fault := checkpoint.fault_of(path))]


def traceback_of(job: Job) -> list[str]:
    """A traceback where a line is due; what the launcher quotes of a rank is set in."""
    said = "\n".join(line.text for line in job.err if not line.text.startswith("  "))
    return ["a traceback"] if "Traceback" in said else []


def cause_line(job: Job) -> str:
    """The cause of the first attempt, as the report tells it."""
    attempts = job.report().get("attempts") or []
    return str(attempts[0]["cause"]) if attempts else ""


def last_words(job: Job) -> str:
    """The end of what was said on standard error."""
    return " / ".join(line.text for line in job.err[-3:])
