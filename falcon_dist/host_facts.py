"""One host's facts that need torch, as JSON: ``python -m falcon_dist.host_facts [--leak]``; the launcher judges.

The first product is a bf16 linear layer: under oneDNN's verbose mode its first line tells which kernel that takes.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Final

import torch

from falcon_dist import contract
from falcon_dist.exchange import exchange

LEAK: Final = "--leak"


def main() -> None:
    """Prints the facts; an all_reduce with the other hosts is one of them where the environment says who they are."""
    multiply()
    told: dict[str, Any] = {"torch": torch.__version__, "gloo": torch.distributed.is_gloo_available()}
    if LEAK in sys.argv[1:]:
        told["leak"] = packing_leak()
    if contract.MASTER_ADDR in os.environ:
        told["all_reduce"] = exchange()
    print(json.dumps(told), flush=True)
    os._exit(0)  # torch can abort while a process that had a gloo group is taken down


def multiply() -> None:
    """A bf16 linear layer, large enough for the kernels of training."""
    layer = torch.nn.Linear(256, 256, dtype=torch.bfloat16)
    layer(torch.randn(64, 256, dtype=torch.bfloat16))


def packing_leak() -> float:
    """How far packed samples of a small Falcon see each other; 0.0 is right."""
    # Twice as long to import as torch itself, and hosts with the same software need it on one of them only.
    from transformers import FalconConfig, FalconForCausalLM

    from falcon_dist.masking import leak

    shape = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)  # small initial weights make all logits alike, and a leak would drown in them
    return leak(model)


if __name__ == "__main__":
    main()
