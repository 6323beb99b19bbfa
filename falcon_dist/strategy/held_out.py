"""What a held-out row needs for a moment, at most: its mask, and attention's scores or the row's logits."""

from __future__ import annotations

from typing import Final

from transformers import PreTrainedConfig, PreTrainedModel

from falcon_dist.config import Precision, TrainConfig
from falcon_dist.loss import PIECE_BYTES

MATH_SCORE: Final = 9
"""Bytes a score where torch has no kernel for sdpa: fp32 scores, their softmax, and a byte to look for empty rows."""
EAGER_SCORE: Final[dict[Precision, tuple[int, int]]] = {"bf16": (10, 10), "bf16-autocast": (14, 10), "fp32": (16, 8)}
"""Likewise of eager attention: Falcon's, and that of others; the most of what processors with and without bf16 take."""
ALIBI_SCORE: Final = 24
"""Likewise of eager attention with a position bias, which is in fp32."""


def held_out_bytes(config: TrainConfig, model: PreTrainedModel, attention: str) -> int:
    """The most that one row takes in the plain form; ``attention`` is the plain one. 0 where nothing is held out."""
    if not (config.data.eval_share or config.data.eval_name):
        return 0
    each, length = 4 if config.precision == "fp32" else 2, config.data.max_length
    numbers = length * int(model.get_output_embeddings().weight.shape[0])
    logits = each * numbers + 2 * min(PIECE_BYTES, 4 * numbers)
    # The mask as it is and as attention takes it. Scores of the last layer are gone when logits are made.
    return (1 + each) * length**2 + max(logits, _attention_bytes(config, model.config, attention))


def _attention_bytes(config: TrainConfig, plan: PreTrainedConfig, attention: str) -> int:
    """Scores of all heads of a layer, and fp32 copies of its queries and keys beside them."""
    text, length = plan.get_text_config(), config.data.max_length
    score = _score_bytes(plan, attention, config.precision)
    heads = int(getattr(text, "num_attention_heads", 0))
    return (score * heads * length + 8 * int(text.hidden_size)) * length if score else 0


def _score_bytes(plan: PreTrainedConfig, attention: str, precision: Precision) -> int:
    """Bytes for each head and each pair of tokens, as measured; 0 where torch's own kernel makes no scores."""
    falcon = plan.model_type == "falcon"
    if getattr(plan, "alibi", False):
        return ALIBI_SCORE if attention == "eager" else 2 if precision == "bf16" else 4  # sdpa: a mask for each head
    if attention == "eager":
        return EAGER_SCORE[precision][0 if falcon else 1]
    # Falcon gives sdpa all heads of queries and the one of keys that they share, for which torch has no kernel.
    return MATH_SCORE if falcon and plan.multi_query and not plan.new_decoder_architecture else 0
