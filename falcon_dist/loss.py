"""Next-token loss over packed rows: one definition for training, evaluation and tests."""

from __future__ import annotations

import torch
from torch.nn import functional as nnf

from falcon_dist.rows import IGNORED


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, T, V] logits of any float dtype, [B, T] labels -> [B, T-1] fp32 loss of labels[:, 1:], 0 where IGNORED."""
    ahead = labels[:, 1:]
    flat = nnf.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ahead.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(ahead.shape)


def count_labels(labels: torch.Tensor) -> int:
    """Tokens of [B, T] labels that carry loss."""
    return int((labels[:, 1:] != IGNORED).sum())
