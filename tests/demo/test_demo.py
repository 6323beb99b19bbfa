"""What `make demo` left in runs/: the numbers it promises, and a checkpoint that plain transformers loads."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launching import BIN, environment, run_python, step_records

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run() -> Path:
    """The newest run."""
    runs = sorted((ROOT / "runs").glob("*/report.json"), key=lambda path: path.stat().st_mtime)
    assert runs, "no run found; run make demo first"
    return runs[-1].parent


@pytest.fixture(scope="module")
def summary(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    return json.loads((run / "attempt_1" / "rank_0000" / "result.json").read_text())["summary"]


def test_tuned_perplexity_is_at_least_a_tenth_below_base(summary) -> None:
    base, tuned = (summary[name]["held_out"] for name in ("base", "tuned"))
    assert tuned["perplexity"] <= 0.9 * base["perplexity"]
    assert base["records"] == tuned["records"] >= 64
    assert base["tokens"] == tuned["tokens"]
    assert 0 < tuned["standard_error"] < 0.5


@pytest.mark.parametrize(("name", "loss_share"), [("base", 0.005), ("tuned", 0.03)])
def test_readme_shows_what_the_demo_prints(summary, name: str, loss_share: float) -> None:
    """Losses may differ by these shares, for processors round differently; what was measured may not."""
    shown = re.search(
        rf"^held-out, {name}: +loss ([\d.]+) \+- [\d.]+, perplexity ([\d.]+) \(([\d,]+) tokens of (\d+) records\)$",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    assert shown
    found = summary[name]["held_out"]
    assert float(shown[1]) == pytest.approx(found["loss"], rel=loss_share)
    assert float(shown[2]) == pytest.approx(found["perplexity"], rel=3.6 * loss_share)
    assert (int(shown[3].replace(",", "")), int(shown[4])) == (found["tokens"], found["records"])


def test_at_least_a_hundred_rows_were_trained_on_two_ranks(run: Path) -> None:
    rows = [row for step in step_records(run).values() for row in step["rows"]]
    assert len(rows) == len(set(rows)) >= 100
    assert len(list((run / "attempt_1").glob("rank_*"))) == 2


def test_both_models_answered(summary) -> None:
    (base,), (tuned,) = (summary[name]["answers"].values() for name in ("base", "tuned"))
    assert base
    assert tuned
    assert base != tuned


def newest_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def test_checkpoint_is_sharded_and_loads_in_plain_transformers(run: Path) -> None:
    last = newest_checkpoint(run)
    assert len(list(last.glob("model-*.safetensors"))) >= 2
    code = (
        "import sys; from transformers import AutoModelForCausalLM as M; m = M.from_pretrained(sys.argv[1]);"
        "assert 'falcon_dist' not in sys.modules; print(sum(p.numel() for p in m.parameters()))"
    )
    assert run_python(run, code, str(last)).stdout.strip() == "134515008"


def test_chat_command_answers(run: Path) -> None:
    done = subprocess.run(
        [str(BIN / "falcon"), "chat", str(newest_checkpoint(run)), "--max-length", "20", "--top-k", "10"],
        env=environment(),
        input="Hi! How was your weekend?\nstop\n",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s]" in done.stdout


def told(command: str) -> tuple[list[str], str]:
    """Words and output of the block of README that shows this command."""
    found = re.search(
        rf"^\$ ({re.escape(command)}.*)\n((?:.*\n)*?)```$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert found, f"README shows no output of: {command}"
    return shlex.split(found[1]), found[2]


def done_as_told(words: list[str], run: Path, **options: str) -> str:
    """What the words print, with the demo's newest run in place of README's, as wide as README's."""
    last = str(newest_checkpoint(run).relative_to(ROOT))
    words = [str(BIN / words[0]), *(last if word.startswith("runs/") else word for word in words[1:])]
    env = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_figures(text: str) -> str:
    """Figures and run names as #: what is the same on every machine."""
    return re.sub(r"[\d.,]*\d", "#", re.sub(r"runs/[^/ ]+", "runs/#", text))


def figures(text: str) -> list[float]:
    """The figures outside of run names, in their order."""
    return [float(found.replace(",", "")) for found in re.findall(r"[\d.,]*\d", re.sub(r"runs/[^/ ]+", "runs/", text))]


@pytest.mark.timeout(960)  # every held-out row, by both models, in one process
def test_readme_shows_what_compare_prints(run: Path) -> None:
    """Answers may be others: another number of threads rounds differently, and one word changes all that follow."""
    words, shown = told("falcon compare")
    seen = done_as_told(words, run)
    heads = [text.partition("\n---")[0] for text in (shown, seen)]
    assert without_figures(heads[1]) == without_figures(heads[0])
    assert figures(heads[1]) == pytest.approx(figures(heads[0]), rel=0.11)
    for text in (shown, seen):
        columns = [line.split("|") for line in text.partition("\n---")[2].splitlines()[1:]]
        base, tuned = (" ".join(column[place].strip() for column in columns).split() for place in (0, 1))
        assert base
        assert tuned
        assert base != tuned


def test_readme_shows_what_chat_prints(run: Path) -> None:
    first, shown = told("printf")
    _, said, pipe, *words = first
    assert pipe == "|"
    seen = done_as_told(words, run, input=said.replace("\\n", "\n"))
    for text in (seen, shown):
        *answer, tally = text.splitlines()
        assert any(answer)
        assert without_figures(tally) == "[# tokens in # s, # tokens/s]"
