"""The fast paths of a model: put on while it trains, taken off for everything else.

Held-out figures and answers are computed in the plain form, transformers' own attention and logits, so what a run
claims never rests on the paths that it trained with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from falcon_dist.config import EngineConfig, ModelConfig, StrategyName
from falcon_dist.contract import UserError
from falcon_dist.engine.attention import SEGMENTS
from falcon_dist.engine.fused import FusedParts
from falcon_dist.engine.head import LossHead
from falcon_dist.engine.linear import FastLayers, trained_layers
from falcon_dist.loss import token_losses

FAMILIES: Final = ("falcon", "llama")
"""Model types whose attention and output layer were compared with the plain form, see tests/unit/test_engine.py."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a model trains with."""

    attention: str
    chunked_head: bool
    plain_attention: str
    """What it has in the plain form."""
    fast_layers: bool = False
    """Weight gradients as in linear.py, norms, gates and turned heads as in fused.py."""
    reasons: tuple[str, ...] = ()
    """Why something is not the fast one, in a few words each."""


def choose(plan: PreTrainedConfig, model: ModelConfig, engine: EngineConfig, strategy: StrategyName = "ddp") -> Choice:
    """Settles every "auto" for this architecture; zero3 has a forward of its own for layers, and weights in parts.

    Raises:
        UserError: what was asked for does not fit the model.
    """
    refusals = {"model.attention": _no_segments(plan), "engine.head": _no_chunks(plan)}
    asked = {"model.attention": model.attention == SEGMENTS, "engine.head": engine.head == "chunked"}
    for key, why in refusals.items():
        if why and asked[key]:
            value = getattr(model if key.startswith("model") else engine, key.partition(".")[2])
            raise UserError(f'{key}: "{value}" cannot be had: {why}; set {key}=auto')
    if model.attention == "sdpa" and not _has_sdpa(plan):
        raise UserError(
            f'model.attention: "sdpa" cannot be had: transformers has none for "{plan.model_type}"; '
            "set model.attention=auto"
        )
    fast = model.attention in ("auto", SEGMENTS) and not refusals["model.attention"]
    plain = plain_attention(plan, model.attention)
    auto = {"model.attention": model.attention == "auto", "engine.head": engine.head == "auto"}
    return Choice(
        attention=SEGMENTS if fast else plain,
        chunked_head=engine.head != "plain" and not refusals["engine.head"],
        plain_attention=plain,
        fast_layers=engine.kind == "native" and plan.model_type in FAMILIES and strategy != "zero3",
        reasons=tuple(why for key, why in refusals.items() if why and auto[key]),
    )


def plain_attention(plan: PreTrainedConfig, asked: str) -> str:
    """transformers' own attention for this architecture: the one asked for, else sdpa where there is one."""
    return asked if asked in ("sdpa", "eager") else "sdpa" if _has_sdpa(plan) else "eager"


def _has_sdpa(plan: PreTrainedConfig) -> bool:
    return bool(getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(plan), None), "_supports_sdpa", False))


def _no_segments(plan: PreTrainedConfig) -> str | None:
    if plan.model_type not in FAMILIES:
        return f'segment attention is not proven for "{plan.model_type}"'
    if getattr(plan, "alibi", False):
        return "alibi's position bias does not go through segment attention"
    if plan.model_type == "llama" and getattr(plan, "attention_dropout", 0.0):
        return "segment attention has no dropout"
    return None


def _no_chunks(plan: PreTrainedConfig) -> str | None:
    return None if plan.model_type in FAMILIES else f'the chunked loss head is not proven for "{plan.model_type}"'


class TrainingForm:
    """A loaded model's two forms; it begins in the plain one."""

    def __init__(self, model: PreTrainedModel, choice: Choice) -> None:
        self._model = model
        self._head: LossHead | None = None
        self._layers: list[FastLayers | FusedParts] = []
        self._active = False
        self.choice = choice
        self._set_attention(choice.plain_attention)

    @contextmanager
    def training(self) -> Iterator[None]:
        """The fast form, as long as the block lasts."""
        self._put_on()
        try:
            yield
        finally:
            self._take_off()

    @contextmanager
    def plain(self) -> Iterator[None]:
        """The plain form, also inside a ``training`` block."""
        was_active = self._active
        self._take_off()
        try:
            yield
        finally:
            if was_active:
                self._put_on()

    def loss(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor, factor: float
    ) -> torch.Tensor:
        """``factor`` x the loss summed over [B, T] labels; ``model`` is this one or what wraps it."""
        if self._head is None:
            return token_losses(model(**inputs, use_cache=False).logits, labels).sum() * factor
        with self._head.asked(labels, factor):
            loss: torch.Tensor = model(**inputs, use_cache=False).logits
        return loss

    def line(self, engine: str = "native") -> str:
        """For a person, before training."""
        head = "chunked" if self.choice.chunked_head else "plain"
        reasons = "".join(f" ({why})" for why in self.choice.reasons)
        return (
            f"engine: {engine}; training by {self.choice.attention} attention and {head} loss head{reasons}; "
            f"held-out figures and answers by {self.choice.plain_attention} attention and plain logits"
        )

    def _put_on(self) -> None:
        self._set_attention(self.choice.attention)
        if self.choice.chunked_head:
            self._head = LossHead(self._model.get_output_embeddings())
        if self.choice.fast_layers:
            fast = FastLayers(trained_layers(self._model, self._model.get_output_embeddings()))
            self._layers = [fast, FusedParts(self._model)]
        self._active = True

    def _take_off(self) -> None:
        self._set_attention(self.choice.plain_attention)
        if self._head is not None:
            self._head.remove()
            self._head = None
        for layers in self._layers:
            layers.remove()
        self._layers = []
        self._active = False

    def _set_attention(self, name: str) -> None:
        self._model.config._attn_implementation = name
