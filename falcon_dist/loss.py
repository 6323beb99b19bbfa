"""Next-token loss over packed rows: one definition for training, evaluation and tests."""

from __future__ import annotations

from typing import Final

import torch
from torch.nn import functional as nnf

from falcon_dist.rows import IGNORED

PIECE_BYTES: Final = 16 << 20
"""fp32 logits at once where no gradient is asked for."""


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B, T, V] logits of any float dtype, [B, T] labels -> [B, T-1] fp32 loss of labels[:, 1:], 0 where IGNORED."""
    ahead = labels[:, 1:]
    rows, wanted = logits[:, :-1].flatten(0, 1), ahead.flatten()
    if logits.requires_grad:
        return _losses(rows, wanted).view(ahead.shape)
    # Nothing has to be kept: a long row of a large vocabulary takes gigabytes in fp32, twice.
    count = max(1, PIECE_BYTES // (4 * logits.shape[-1]))
    pieces = zip(torch.split(rows, count), torch.split(wanted, count), strict=True)
    return torch.cat([_losses(*piece) for piece in pieces]).view(ahead.shape)


def _losses(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return nnf.cross_entropy(logits.float(), wanted, ignore_index=IGNORED, reduction="none")


def count_labels(labels: torch.Tensor) -> int:
    """Tokens of [B, T] labels that carry loss."""
    return int((labels[:, 1:] != IGNORED).sum())
