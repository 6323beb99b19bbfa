"""``falcon push CKPT REPO``: a checkpoint to the Hugging Face hub, with a model card made from its run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from falcon_dist import checkpoint
from falcon_dist.config import TrainConfig
from falcon_dist.contract import RankResult, UserError
from falcon_dist.engine.native import ADAPTER_CONFIG
from falcon_dist.evaluate import HeldOut
from falcon_dist.monitor import EVALUATIONS_FILE
from falcon_dist.readers import READERS, kind_of
from falcon_dist.settings import read_config
from falcon_dist.sources import trained_on

CARD: Final = "README.md"
LEFT_OUT: Final = (checkpoint.TRAIN_STATE, checkpoint.MANIFEST)
"""What nobody needs who uses the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a checkpoint comes from."""

    checkpoint: checkpoint.Checkpoint
    config: TrainConfig
    summary: dict[str, Any]
    """Rank 0's closing figures, those of this checkpoint's step as "tuned"; without what was not measured of it."""


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The verb's own flags."""
    parser = argparse.ArgumentParser(prog="falcon push", description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("checkpoint", type=Path, help="a checkpoint of a run, as runs/RUN/checkpoints/step-000500")
    flag("repo", help="where to, as NAME/MODEL")
    flag("--private", action="store_true", help="only for those who may see it")
    flag("--license", help="licence of the model, as apache-2.0: yours to know")
    flag("--dry-run", action="store_true", help="print the card and the files and stop")
    return parser.parse_args(argv)


def push(argv: Sequence[str]) -> int:
    """Verifies the checkpoint, writes its card and sends both.

    Raises:
        UserError: the checkpoint does not verify, or the hub refuses.
    """
    args = parse_args(argv)
    if args.repo.count("/") != 1 or not all(args.repo.split("/")):
        raise UserError(f'falcon push: a repository is named NAME/MODEL: "{args.repo}"')
    origin = find_origin(args.checkpoint.resolve())
    text = card(origin, args.repo, args.license)
    files = files_of(origin.checkpoint.path)
    for name, size in files.items():
        print(f"{size / 2**20:10.1f} MiB  {name}")
    print(f"{sum(files.values()) / 2**20:10.1f} MiB  to {args.repo}, and {CARD}:\n\n{text}")
    if not args.dry_run:
        _send(origin, args, list(files), text)
    return 0


def find_origin(path: Path) -> Origin:
    """The run that a checkpoint lies in.

    Raises:
        UserError: it is no checkpoint of a run, or a byte of it is not as it was written.
    """
    fault = checkpoint.fault_of(path) if path.is_dir() else "no such folder"
    if fault:
        raise UserError(f'falcon push: "{path}" cannot be trusted: {fault}')
    run = path.parent.parent
    numbers = [path.name.removeprefix("attempt_") for path in run.glob("attempt_*") if (path / "rank_0000").is_dir()]
    newest = max((int(number) for number in numbers if number.isdecimal()), default=None)  # not a copy of one
    last = RankResult.read(run / f"attempt_{newest}" / "rank_0000") if newest is not None else None
    found = checkpoint.read(path)
    if "total_steps" not in found.facts:
        raise UserError(f'falcon push: "{path}" was not trained by a run: its manifest tells of none')
    summary = dict(last.summary) if last else {}
    if last is None or last.last_step != found.step or "quantized" in found.facts:
        summary.pop("tuned", None)
        if "quantized" not in found.facts and (measured := _along_the_way(run, found.step)):
            summary["tuned"] = measured
    return Origin(checkpoint=found, config=read_config(run / "config.json"), summary=summary)


def _along_the_way(run: Path, step: int) -> dict[str, Any] | None:
    """What was measured after ``step``, if anything was; a step that was done again counts as it was last."""
    file = run / EVALUATIONS_FILE
    lines = file.read_bytes().split(b"\n") if file.is_file() else []  # answers may hold what else ends a line of text
    return next((told for told in map(_object, reversed(lines)) if told.get("step") == step), None)


def _object(line: bytes) -> dict[str, Any]:
    """What a line tells: nothing behind the last one, or where a host that went down left half of it."""
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def files_of(path: Path) -> dict[str, int]:
    """{name: bytes} of what is sent."""
    found = {str(f.relative_to(path)): f.stat().st_size for f in sorted(path.rglob("*")) if f.is_file()}
    return {name: size for name, size in found.items() if name.split("/")[0] not in (*LEFT_OUT, CARD)}


def card(origin: Origin, repo: str, licence: str | None) -> str:
    """The model card: what was tuned, on what, how, and with what result."""
    from huggingface_hub import ModelCardData

    config, names, beside = origin.config, trained_on(origin.config.data), _beside(origin)
    model, told = _shown(config.model.name, beside), ", ".join(_shown(name, beside) for name in names)
    data = ModelCardData(
        base_model=config.model.name if _is_hub_name(config.model.name, beside) else None,
        datasets=[name for name in names if _is_hub_name(name, beside)] or None,
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["falcon-dist", "cpu"],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repo.split('/')[1]}\n\n`{model}`, fine-tuned on `{told}` with falcon-dist on CPUs.",
        _results(origin.summary),
        _settings(origin),
        _samples(origin.summary),
        f'## Use\n\n```python\nfrom transformers import pipeline\n\npipeline("text-generation", model="{repo}")\n```',
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _beside(origin: Origin) -> Path:
    """Where the run was most likely started: what it calls models/mine is looked for there too."""
    run = origin.checkpoint.path.parent.parent
    return run.parent.parent


def _is_hub_name(name: str, beside: Path) -> bool:
    """Whether others can fetch it by this name: no path, whose file may be gone by now."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or any(sign in name for sign in "*?["):
        return False
    return kind_of(Path(name)) not in READERS and not Path(name).exists() and not (beside / name).exists()


def _shown(name: str, beside: Path) -> str:
    """A path of somebody's machine is nobody else's business."""
    return name if _is_hub_name(name, beside) else Path(name).name


def _results(summary: dict[str, Any]) -> str:
    sides = [(name, summary.get(name, {}).get("held_out")) for name in ("base", "tuned")]
    rows = [f"| {name} | {HeldOut.from_dict(told)} |" for name, told in sides if told]
    return "\n".join(["## Held-out text", "", "| model | result |", "|---|---|", *rows]) if rows else ""


def _settings(origin: Origin) -> str:
    config, facts = origin.config, origin.checkpoint.facts
    optim = config.optim
    rows = {
        "steps": f"{origin.checkpoint.step} of {facts['total_steps']}",
        "rows a step": f"{facts['global_batch']} of {config.data.max_length} tokens",
        "packing": config.data.packing_kind,
        "loss on": {"all": "all tokens", "answers": "answers only"}[config.data.loss],
        "learning rate": f"{optim.lr:g}, {optim.schedule}",
        **_update(config),
        "precision": config.precision,
        "ranks": facts["world_size"],
        "seed": config.seed,
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["## Training", "", "| setting | value |", "|---|---|", *lines])


def _update(config: TrainConfig) -> dict[str, str]:
    optim = config.optim
    decay = f"weight decay {optim.weight_decay:g}"
    if config.strategy == "full-lowmem":
        return {"Adafactor": decay}
    return {"AdamW": f"betas {optim.beta1:g} and {optim.beta2:g}, eps {optim.eps:g}, {decay}"}


def _samples(summary: dict[str, Any]) -> str:
    answers = summary.get("tuned", {}).get("answers", {})
    parts = [f"> {prompt}\n\n{text}" for prompt, text in answers.items()]
    return "\n\n".join(["## Samples", *parts]) if parts else ""


def _send(origin: Origin, args: argparse.Namespace, files: list[str], text: str) -> None:
    from huggingface_hub import HfApi

    api, path, told = HfApi(), origin.checkpoint.path, _adapters(origin)
    as_they_are = [name for name in files if name != ADAPTER_CONFIG or told is None]
    try:
        api.create_repo(args.repo, private=args.private, exist_ok=True)
        api.upload_folder(repo_id=args.repo, folder_path=path, allow_patterns=as_they_are, commit_message="Weights")
        for name, content in ((ADAPTER_CONFIG, told), (CARD, text)):
            if content is not None:
                api.upload_file(
                    path_or_fileobj=content.encode(), path_in_repo=name, repo_id=args.repo, commit_message=name
                )
    except Exception as error:  # the hub's client has errors of several libraries for a network that is not there
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f'falcon push: the hub refuses "{args.repo}": {first}; see hf auth login') from error
    print(json.dumps({"pushed": args.repo, "files": len(files) + 1}))


def _adapters(origin: Origin) -> str | None:
    """What adapters tell of their model, by its name in the run: where it lay on this machine is no way to it."""
    file = origin.checkpoint.path / ADAPTER_CONFIG
    if not file.is_file():
        return None
    name = _shown(origin.config.model.name, _beside(origin))
    return json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}, indent=2) + "\n"
