"""The arguments of the 2023 recipe, translated aloud into today's settings. Standard library only.

People type what they know: ``--bf16 True --use_ipex True --max_seq_length 512``, the names of transformers'
TrainingArguments, trl's SFTTrainer and the scripts around them. Each name here becomes settings, or a line that
says why nothing has to be set, or a refusal where following it silently would give other weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from falcon_dist.contract import UserError

CPU_ISA: Final = "ONEDNN_MAX_CPU_ISA=AVX512_CORE_AMX"
"""What the recipe exported. It is a cap: oneDNN uses nothing newer than this."""
IPEX: Final = "intel_extension_for_pytorch"
LINKS: Final = "checkpoint.links"
RESULTS: Final = "./results"
"""The recipe's output_dir."""
PROGRAM_MARKS: Final = ("--", "-m", "--module")
TRUTHS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("true", "1", "yes", "y", "t"), "true"),
    **dict.fromkeys(("false", "0", "no", "n", "f"), "false"),
}


class Now(NamedTuple):
    """What an old argument is today."""

    words: tuple[str, ...] = ()
    """Arguments of falcon-launch."""
    why: str = ""
    """Said aloud, beside or in place of the words."""
    place: int = 0
    """Where two names mean one setting, the words of the higher place win, wherever they stood."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Old:
    """One argument of old."""

    now: Callable[[str], Now]
    boolean: bool = False
    """It may stand alone, meaning True."""
    more: tuple[str, ...] = ()
    """Words that may follow the value."""


def _to(key: str, why: str = "") -> Old:
    """A setting of another name."""
    return Old(now=lambda value: Now(("--set", f"{key}={value}"), why))


def _switch(key: str, why: str = "", yes: str = "true", no: str = "false") -> Old:
    """A truth that became a setting."""
    return Old(now=lambda value: Now(("--set", f"{key}={yes if value == 'true' else no}"), why), boolean=True)


def _gone(why: str, *, boolean: bool = False) -> Old:
    """Nothing to set."""
    return Old(now=lambda _: Now((), why), boolean=boolean)


def _only(needed: str, why: str, refusal: str) -> Old:
    """A truth that can only be one way."""

    def now(value: str) -> Now:
        if value != needed:
            raise UserError(refusal)
        return Now((), why)

    return Old(now=now, boolean=True)


def _backend(value: str) -> Now:
    if value not in ("ccl", "gloo"):
        raise UserError(f'--ddp_backend: CPUs meet over "gloo" or "ccl": "{value}"')
    return Now(("--backend", value))


def _ipex(value: str) -> Now:
    if value != "true":
        return Now((), "torch's own kernels are used")
    if importlib.util.find_spec(IPEX) is None:
        return Now((), f"{IPEX} is not installed here; torch itself reaches oneDNN's AMX and AVX-512 kernels now")
    return Now(("--engine", "ipex"))


def _optimizer(value: str) -> Now:
    if not value.startswith("adamw_torch") or value.endswith("bit"):
        raise UserError(f'--optim: only AdamW with exact fp32 state is here: "{value}"; leave it out')
    return Now((), "AdamW it is")


def _resume(value: str) -> Now:
    if value.lower() not in TRUTHS:
        raise UserError(f'--resume_from_checkpoint: a run is resumed, not a folder: "{value}"; use --resume RUN')
    return Now(("--resume", "auto")) if TRUTHS[value.lower()] == "true" else Now((), "a new run starts")


def _evaluation(value: str) -> Now:
    if value not in ("no", "steps", "epoch"):
        raise UserError(f'--evaluation_strategy: must be "no", "steps" or "epoch": "{value}"')
    if value == "steps":
        return Now(("--set", "evaluate.every=500"), "or as --eval_steps says", place=-1)
    return Now(("--set", "evaluate.every=0"), "measured at the end", place=1)


def _saving(value: str) -> Now:
    if value not in ("no", "steps", "epoch"):
        raise UserError(f'--save_strategy: must be "no", "steps" or "epoch": "{value}"')
    if value == "steps":
        return Now((), "saved every checkpoint.every steps and at the end")
    return Now(("--set", "checkpoint.every=0"), "saved at the end", place=1)


def _trackers(value: str) -> Now:
    whole = {"none": (), "all": ("tensorboard", "wandb", "mlflow")}
    names = dict.fromkeys(name for word in value.split() for name in whole.get(word, (word,)))
    return Now(("--set", "report.to=[" + ", ".join(f'"{name}"' for name in names) + "]"))


def _max_steps(value: str) -> Now:
    return Now(("--set", f"loop.max_steps={'none' if value == '-1' else value}"))


def _schedule(value: str) -> Now:
    if value != "constant":
        return Now(("--set", f"optim.schedule={'constant' if value == 'constant_with_warmup' else value}"))
    words = ("--set", "optim.schedule=constant", "--set", "optim.warmup_steps=0", "--set", "optim.warmup_share=0")
    return Now(words, "it never warmed up, constant_with_warmup does", place=1)


def _output_dir(value: str) -> Now:
    return Now(("--set", f"{LINKS}={value}"), "checkpoints are in the run's folder, checkpoint-N links here")


_ALWAYS_CPU: Final = "ranks always run on CPUs"
_NO_GPU: Final = "this trains on CPUs only: leave it out"
_EXACT: Final = "packing counts real tokens"
_TRACKERS: Final = (
    *("all", "none", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "mlflow"),
    *("neptune", "swanlab", "tensorboard", "trackio", "wandb"),
)
"""What ``--report_to`` took, any number of them."""
_PUSH: Final = "falcon push does that when the run is done"
OLD: Final[Mapping[str, Old]] = {
    # model and data
    **dict.fromkeys(("model_name", "model_name_or_path", "model_id"), _to("model.name")),
    **dict.fromkeys(("tokenizer", "tokenizer_name"), _gone("the model's own tokenizer is used")),
    "dataset_name": _to("data.name"),
    "dataset_text_field": _to("data.text_field"),
    "max_seq_length": _to("data.max_length"),
    "max_length": _to("data.max_length"),
    "packing": _switch("data.packing", "samples in a row do not see each other"),
    "dataset_batch_size": _gone(_EXACT),
    "num_of_sequences": _gone(_EXACT),
    "chars_per_token": _gone(_EXACT),
    "group_by_length": _gone("packed rows are all of one length", boolean=True),
    "remove_unused_columns": _gone("data.columns names the ones that are used", boolean=True),
    # precision and devices
    "bf16": _switch("precision", "fp32 weights under bf16 autocast, as then", yes="bf16-autocast", no="fp32"),
    "fp16": _only("false", "there is none", "--fp16: CPUs would ignore it: use --bf16 True"),
    "tf32": _only("false", "there is none", f"--tf32: {_NO_GPU}"),
    "use_ipex": Old(now=_ipex, boolean=True),
    "jit_mode_eval": _gone("not needed to evaluate", boolean=True),
    "torchdynamo": _gone("models run as they are"),
    "torch_compile": _gone("models run as they are", boolean=True),
    "no_cuda": _only("true", _ALWAYS_CPU, f"--no_cuda: {_NO_GPU}"),
    "use_cpu": _only("true", _ALWAYS_CPU, f"--use_cpu: {_NO_GPU}"),
    "ddp_backend": Old(now=_backend),
    "xpu_backend": Old(now=_backend),
    "ddp_find_unused_parameters": _gone("all parameters are used", boolean=True),
    "gradient_checkpointing": _switch("loop.grad_checkpointing"),
    # the loop
    "per_device_train_batch_size": _to("loop.micro_batch", "rows of one rank"),
    "per_device_eval_batch_size": _gone("held-out rows are measured one by one"),
    "gradient_accumulation_steps": _to("loop.grad_accum"),
    "num_train_epochs": _to("loop.epochs"),
    "max_steps": Old(now=_max_steps),
    "learning_rate": _to("optim.lr"),
    "lr_scheduler_type": Old(now=_schedule),
    "warmup_steps": _to("optim.warmup_steps"),
    "warmup_ratio": _to("optim.warmup_share"),
    "weight_decay": _to("optim.weight_decay"),
    "max_grad_norm": _to("optim.max_grad_norm"),
    "adam_beta1": _to("optim.beta1"),
    "adam_beta2": _to("optim.beta2"),
    "adam_epsilon": _to("optim.eps"),
    "optim": Old(now=_optimizer),
    "seed": _to("seed"),
    "data_seed": _gone("--seed decides the order of the data too"),
    # keeping, evaluating, reporting
    "output_dir": Old(now=_output_dir),
    "overwrite_output_dir": _gone("every run has a folder of its own", boolean=True),
    "save_strategy": Old(now=_saving),
    "save_steps": _to("checkpoint.every"),
    "save_total_limit": _to("checkpoint.keep_last"),
    "save_safetensors": _only("true", "always", "--save_safetensors: pickle is never written: leave it out"),
    "load_best_model_at_end": _switch("checkpoint.keep_best", "checkpoints/best points at it"),
    "resume_from_checkpoint": Old(now=_resume, boolean=True),
    "evaluation_strategy": Old(now=_evaluation),
    "eval_strategy": Old(now=_evaluation),
    "eval_steps": _to("evaluate.every"),
    "logging_steps": _to("report.log_every"),
    "logging_strategy": _gone("report.log_every says how often"),
    "logging_dir": _gone("trackers write into the run's folder"),
    "report_to": Old(now=_trackers, more=_TRACKERS),
    "push_to_hub": _gone(_PUSH, boolean=True),
    "push_to_hub_model_id": _gone(_PUSH),
    "hub_model_id": _gone(_PUSH),
}


class Translated(NamedTuple):
    """A command line of old as one of today."""

    argv: list[str]
    lines: tuple[str, ...]
    """To be said aloud; empty where no old name was used."""


def translate(argv: Sequence[str], switches: Sequence[str] = ()) -> Translated:
    """Translates falcon-launch's own arguments; another program and its arguments are left alone.

    Args:
        argv: the words behind ``falcon-launch``.
        switches: flags of today that take no value.

    Raises:
        UserError: an old argument lacks its value, or asks for what cannot be done here.
    """
    own = list(argv)
    words: list[str] = []
    found: list[Now] = []
    lines: list[str] = []
    while own and own[0].startswith("-") and own[0] not in PROGRAM_MARKS:
        word = own.pop(0)
        name, equals, value = word.partition("=")
        old = OLD.get(name[2:].replace("-", "_")) if name.startswith("--") else None
        if old is None:
            words.append(word)
            if not equals and word.replace("_", "-") not in switches and _is_value(own):
                words.append(own.pop(0))
            continue
        behind = list(own)
        now = old.now(_value(name, old, value if equals else None, own))
        found.append(now)
        lines.append(_line(" ".join([word, *behind[: len(behind) - len(own)]]), now))
    if not lines:
        return Translated(list(argv), ())
    # Settings of today that were given beside come last: they win.
    words = [*(word for now in sorted(found, key=lambda now: now.place) for word in now.words), *words]
    extra = _as_the_recipe_did(words)
    return Translated([*words, *extra.words, *own], (*lines, extra.why, *_which_model(words, own)))


def _is_value(words: Sequence[str]) -> bool:
    """Whether the first word is no flag; a negative number is none."""
    return bool(words) and (not words[0].startswith("-") or words[0][1:2].isdigit())


def _value(name: str, old: Old, given: str | None, own: list[str]) -> str:
    """The value behind ``=`` or in the next word, which is taken; a truth may have none."""
    next_word = own[0] if _is_value(own) else None
    if given is None and old.boolean and (next_word is None or next_word.lower() not in TRUTHS):
        takes_it = next_word is not None and name.replace("-", "_") == "__resume_from_checkpoint"
        return own.pop(0) if takes_it else "true"
    if given is None:
        if next_word is None:
            raise UserError(f"{name}: a value is missing")
        given = own.pop(0)
        while own and own[0] in old.more:
            given = f"{given} {own.pop(0)}"
    return TRUTHS.get(given.lower(), given) if old.boolean else given


def _line(typed: str, now: Now) -> str:
    told = " ".join(word for word in now.words if word != "--set")
    return f"{typed}: " + "; ".join(part for part in (f"now {told}" if told else "", now.why) if part)


def _which_model(words: Sequence[str], program: Sequence[str]) -> tuple[str, ...]:
    """The command of 2023 named no model: its script did."""
    own = ("model.name=", "data.name=", "data.mix=")
    named = any(word.removeprefix("--set=").startswith(("--recipe", "--resume", *own)) for word in words)
    told = "no model or recipe named: the demo is trained; Falcon-7B is --recipe falcon-7b"
    return () if named or program else (told,)


def _as_the_recipe_did(words: Sequence[str]) -> Now:
    """Links named checkpoint-N, and the cap on oneDNN's instruction set."""
    links = () if any(word.startswith(f"{LINKS}=") for word in words) else ("--set", f"{LINKS}={RESULTS}")
    capped = any(word.startswith(CPU_ISA.partition("=")[0]) for word in words)
    cap = () if capped else ("--env", CPU_ISA)
    return Now((*links, *cap), f"as the recipe of 2023: {' '.join((*links, *cap)) or 'nothing more'}")
