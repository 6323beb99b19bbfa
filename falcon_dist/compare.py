"""``falcon compare BASE TUNED``: held-out perplexity on the same rows, and answers side by side."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from falcon_dist.chat_template import set_template
from falcon_dist.config import DataConfig, ModelConfig, TrainConfig
from falcon_dist.contract import UserError
from falcon_dist.dataset import prepare_rows
from falcon_dist.engine.native import load_config, load_model, load_tokenizer
from falcon_dist.evaluate import HeldOut, held_out, perplexity_of
from falcon_dist.generate import Sampling, answer
from falcon_dist.masking import uses_alibi
from falcon_dist.monitor import prompts_of, read_prompts
from falcon_dist.prepare import find_model
from falcon_dist.process_group import open_group
from falcon_dist.rows import NO_ROWS, Part
from falcon_dist.settings import read_config
from falcon_dist.sources import trained_on
from falcon_dist.world import World

SIDES: Final = ("base", "tuned")


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """What was found of one model."""

    model: str
    held_out: HeldOut | None
    answers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two models on the same rows and prompts."""

    data: str | None
    """What the rows were made of."""
    rows: int
    of_rows: int
    """Rows there are."""
    base: Side
    tuned: Side

    @property
    def gain(self) -> float | None:
        """Nats a token by which tuned is better than base."""
        if self.base.held_out is None or self.tuned.held_out is None:
            return None
        return self.base.held_out.loss - self.tuned.held_out.loss

    def as_dict(self) -> dict[str, Any]:
        """For ``--format json``."""
        sides = {
            name: {
                "model": side.model,
                "held_out": side.held_out.as_dict() if side.held_out else None,
                "answers": dict(side.answers),
            }
            for name, side in zip(SIDES, (self.base, self.tuned), strict=True)
        }
        return {"data": self.data, "rows": self.rows, "of_rows": self.of_rows, "gain": self.gain, **sides}


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The verb's own flags."""
    parser = argparse.ArgumentParser(prog="falcon compare", description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("base", help="a model folder or hub name")
    flag("tuned", help="a checkpoint folder")
    flag("--config", type=Path, help="config.json of a run, for data and prompts (default: the run TUNED is of)")
    flag("--data", metavar="NAME", help="held-out data instead: a file, folder or hub name, all of it")
    flag("--rows", type=int, metavar="N", help="only the first N held-out rows: less sure, and sooner there")
    flag("--prompt", action="append", default=[], metavar="TEXT", help="a prompt for both; may be given again")
    flag("--prompts", type=Path, metavar="FILE", help="prompts for both")
    flag("--max-length", type=int, default=48, help="longest answer in tokens (48)")
    flag("--precision", choices=("bf16", "fp32"), default="bf16", help="of weights and compute (bf16)")
    flag("--format", choices=tuple(FORMATS), default="text")
    flag("--output", type=Path, metavar="FILE", help="write there instead of printing")
    return parser.parse_args(argv)


def compare(argv: Sequence[str]) -> int:
    """Measures both models, one after the other, and tells.

    Raises:
        UserError: a model or the data cannot be used, or there is nothing to compare on.
    """
    args = parse_args(argv)
    for name, value in (("--max-length", args.max_length), ("--rows", args.rows)):
        if value is not None and value < 1:
            raise UserError(f'falcon compare: {name} must be at least 1: "{value}"')
    config = _settings(args)
    prompts = (*args.prompt, *(read_prompts(args.prompts) if args.prompts else prompts_of(config.evaluate)))
    models = [_model(name, config) for name in (args.base, args.tuned)]
    whole = _rows(config, models)
    part = whole.first(args.rows or len(whole))
    if not prompts and not len(part):
        raise UserError(
            f'falcon compare: nothing to compare on: "{args.tuned}" is of no run with held-out rows; '
            "give --data or --prompt"
        )
    if len(part) and not part.learns():
        raise UserError(f'--rows: no token of the first rows carries loss: "{args.rows}"; give a higher number')
    with open_group(World(), {}):
        base, tuned = (_side(model, args, part, prompts, config.data.template) for model in models)
    found = Comparison(
        data=(config.data.eval_name or ", ".join(trained_on(config.data))) if len(part) else None,
        rows=len(part),
        of_rows=len(whole),
        base=base,
        tuned=tuned,
    )
    text = FORMATS[args.format](found)
    if args.output:
        args.output.write_text(text + "\n")
    else:
        print(text)
    return 0


def _settings(args: argparse.Namespace) -> TrainConfig:
    """Data and prompts: of ``--data``, of ``--config``, or of the run that the checkpoint lies in."""
    beside = Path(args.tuned).resolve().parent.parent / "config.json"
    given = args.config or (beside if beside.is_file() else None)
    config = read_config(given) if given else TrainConfig(data=DataConfig(name=""))
    if args.data is None:
        return config
    data = dataclasses.replace(config.data, name=args.data, eval_name=args.data, mix=(), eval_share=0.0)
    return dataclasses.replace(config, data=data)


def _model(name: str, config: TrainConfig) -> ModelConfig:
    """A model that was named; the one that the run trained is meant at the run's commit."""
    return ModelConfig(name=name, revision=config.model.revision if name == config.model.name else None)


def _rows(config: TrainConfig, models: Sequence[ModelConfig]) -> Part:
    """The held-out rows, in the tokens of the base model; a record a row where packed ones would see each other."""
    if not any(trained_on(config.data)):
        return NO_ROWS
    data = config.data
    if any(uses_alibi(load_config(find_model(model), model)) for model in models):
        data = dataclasses.replace(data, packing="off")
    tokenizer = load_tokenizer(find_model(models[0]), models[0])
    set_template(tokenizer, data.template)
    return prepare_rows(data, tokenizer).evaluation


def _side(
    config: ModelConfig,
    args: argparse.Namespace,
    part: Part,
    prompts: Sequence[str],
    template: str | None,
) -> Side:
    place = find_model(config)
    tokenizer = load_tokenizer(place, config)
    set_template(tokenizer, template)
    model = load_model(place, config, args.precision).eval()
    measured = held_out(model, part, World(), args.precision) if len(part) else None
    sampling = Sampling(max_new_tokens=args.max_length)
    return Side(
        model=config.name, held_out=measured, answers={p: answer(model, tokenizer, p, sampling) for p in prompts}
    )


def _gain_text(found: Comparison) -> str:
    gain = found.gain or 0.0
    return f"{gain:+.4f} nats a token, perplexity x {perplexity_of(-gain):.3f}"


def as_text(found: Comparison) -> str:
    """For a terminal: figures, then each prompt with its answers in two columns."""
    lines = [f"{name + ':':6} {side.model}" for name, side in zip(SIDES, (found.base, found.tuned), strict=True)]
    if found.gain is not None:
        rows = f"{found.rows:,}" if found.rows == found.of_rows else f"the first {found.rows:,} of {found.of_rows:,}"
        lines.append(f"held-out, {rows} rows of {found.data}:")
        lines += [f"  {n + ':':6} {s.held_out}" for n, s in zip(SIDES, (found.base, found.tuned), strict=True)]
        lines.append(f"  gain:  {_gain_text(found)}")
    width = max(24, (min(shutil.get_terminal_size().columns, 160) - 3) // 2)
    for prompt in found.base.answers:
        lines += ["", f"prompt: {prompt}", f"{'base':{width}} | tuned", f"{'-' * width}-+-{'-' * width}"]
        lines += _columns(found.base.answers[prompt], found.tuned.answers[prompt], width)
    return "\n".join(lines)


def _columns(left: str, right: str, width: int) -> list[str]:
    both = [
        [piece for line in text.splitlines() for piece in textwrap.wrap(line, width) or [""]] for text in (left, right)
    ]
    height = max(map(len, both))
    padded = [column + [""] * (height - len(column)) for column in both]
    return [f"{a:{width}} | {b}".rstrip() for a, b in zip(*padded, strict=True)]


def as_markdown(found: Comparison) -> str:
    """Two tables."""
    lines = []
    if found.gain is not None:
        lines += ["| model | held-out loss | perplexity | tokens |", "|---|---|---|---|"]
        for side in (found.base, found.tuned):
            told = side.held_out
            assert told is not None
            error = f"{told.loss:.4f} ± {told.standard_error:.4f}"
            lines.append(f"| {_cell(side.model)} | {error} | {told.perplexity:.2f} | {told.tokens:,} |")
        lines += ["", f"Gain: {_gain_text(found)}.", ""]
    if found.base.answers:
        lines += ["| prompt | base | tuned |", "|---|---|---|"]
    for prompt, text in found.base.answers.items():
        lines.append(f"| {_cell(prompt)} | {_cell(text)} | {_cell(found.tuned.answers[prompt])} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def as_json(found: Comparison) -> str:
    """One object."""
    return json.dumps(found.as_dict(), indent=1, ensure_ascii=False)


FORMATS: Final = {"text": as_text, "markdown": as_markdown, "json": as_json}
