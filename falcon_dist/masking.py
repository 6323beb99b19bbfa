"""Keeps packed samples apart: segment masks for each architecture, and the check that they hold.

transformers' Falcon ignores position_ids when it builds its mask, so rows of several samples leak; we hand
every model an explicit block-diagonal causal mask instead. Alibi models place their bias through a
two-dimensional mask and cannot take one: they train on one sample a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from falcon_dist.contract import UserError
from falcon_dist.engine.attention import SEGMENTS


def uses_alibi(config: PreTrainedConfig) -> bool:
    """True for models whose position bias (Press et al. 2022, arXiv:2108.12409) is built from a padding mask."""
    return bool(getattr(config, "alibi", False))


def check_packing(config: PreTrainedConfig, packing: bool) -> None:
    """Raises UserError where rows of several samples cannot be kept apart."""
    if packing and uses_alibi(config):
        raise UserError(
            f'data.packing: "{config.model_type}" with alibi takes its position bias from a padding mask and would '
            "let packed samples see each other; set data.packing=false"
        )


def positions(records: torch.Tensor) -> torch.Tensor:
    """[B, T] record of each token -> [B, T] int64 position of each token within its run of one record."""
    place = torch.arange(records.shape[1]).expand_as(records)
    starts = torch.ones_like(records, dtype=torch.bool)
    starts[:, 1:] = records[:, 1:] != records[:, :-1]
    first = torch.where(starts, place, torch.zeros_like(place)).cummax(dim=1).values
    return place - first


def block_causal(records: torch.Tensor) -> torch.Tensor:
    """[B, T] -> [B, 1, T, T] bool, True where a token may look: its own run of one record, not ahead."""
    same = records[:, None, :, None] == records[:, None, None, :]
    return same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()


@dataclass(frozen=True, kw_only=True, slots=True)
class Masking:
    """What the model needs beside its tokens, by its architecture and attention."""

    alibi: bool
    additive: bool
    """Eager attention adds its mask to the scores; sdpa takes a boolean one."""
    dtype: torch.dtype
    segments: bool = False
    """Attention finds the borders in position_ids and takes no mask."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Masking:
        """As the model computes its attention now; ask again after that was changed."""
        way = getattr(model.config, "_attn_implementation", "sdpa")
        additive, segments = way == "eager", way == SEGMENTS
        return cls(alibi=uses_alibi(model.config), additive=additive, dtype=model.dtype, segments=segments)

    def inputs(self, records: torch.Tensor) -> dict[str, torch.Tensor]:
        """[B, T] records -> attention_mask and position_ids as this model's forward takes them."""
        if self.alibi:
            return {"attention_mask": (records >= 0).long()}
        if self.segments:
            return {"position_ids": positions(records)}
        mask = block_causal(records)
        if self.additive:
            mask = torch.zeros(mask.shape, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)
        return {"attention_mask": mask, "position_ids": positions(records)}


@torch.no_grad()
def leak(model: PreTrainedModel, *, length: int = 64, batch: int = 1, seed: int = 0) -> float:
    """How far logits of sample B move when sample A before it in the row is replaced; 0.0 where nothing leaks."""
    generator = torch.Generator().manual_seed(seed)
    masking = Masking.of(model)
    half, vocabulary = length // 2, model.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocabulary, (batch, length), generator=generator)
    records = torch.arange(2).repeat_interleave(half).expand(batch, length).clone()
    other = tokens.clone()
    other[:, :half] = torch.randint(0, vocabulary, (batch, half), generator=generator)
    first, second = (
        model(input_ids=ids, use_cache=False, **masking.inputs(records)).logits[:, half:] for ids in (tokens, other)
    )
    return float((first - second).abs().max())
