"""What DeepSpeed divides over the ranks, read and written one parameter at a time.

Through its API for looking into a run (https://deepspeed.readthedocs.io/en/latest/zero3.html#debugging); DeepSpeed is
imported where it is needed, for it is an extra.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from falcon_dist.checkpoint import TRAIN_STATE
from falcon_dist.engine.named import NamedOptimizer

MASTER = "master"
"""Kind of state that is the weights themselves, in fp32."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class PartitionedAdamW(AdamW, NamedOptimizer):
    """torch's fused AdamW; DeepSpeed gives it this rank's part of all parameters, flat and in fp32, in their place."""

    @property
    def updates(self) -> int:
        """Updates done; DeepSpeed calls ``step`` once for each group of parameters."""
        return max((int(state["step"]) for state in self.state.values()), default=0)

    def begin_at(self, zero: Any, steps: int) -> None:
        """Makes the state, zeros, as after ``steps`` updates.

        The first step would make it too, but then DeepSpeed finds that of the first group of parameters only.

        Args:
            zero: DeepSpeed's optimizer around this one.
            steps: 0 or more.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for flat in _flat_parts(zero):
            moments = {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
            self.state[flat] = {"step": torch.tensor(float(steps)), **moments}
        if not _weights_divided(zero):
            for params, flat in zip(zero.bit16_groups, _flat_parts(zero), strict=True):
                lazy_init_hp_params_optimizer_state(params, flat, self.state)

    def load_named_state(self, names: Mapping[Tensor, str], state: Mapping[str, Tensor], steps: int) -> None:
        """Takes this rank's part of what ``state`` holds, which may be the state of some parameters only."""
        params = {name: param for param, name in names.items()}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            _put(params[name], kind, value)


def whole(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """A weight or its state under its name in ``Kept.tensors``, gathered: all ranks must ask for it.

    Args:
        tensors: parameters and buffers of the model by all their names.
        key: "lm_head.weight", or "train_state/exp_avg/lm_head.weight".
    """
    kind, _, name = key.removeprefix(f"{TRAIN_STATE}/").partition("/")
    if name:
        return _state(tensors[name], kind)
    live = tensors[key]
    return _state(live, MASTER).to(live.dtype) if hasattr(live, "ds_id") else live


def _state(param: Tensor, kind: str) -> Tensor:
    """The whole fp32 state of a parameter, in its shape."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    whole: Tensor = safe_get_full_fp32_param(param) if kind == MASTER else safe_get_full_optimizer_state(param, kind)
    return whole


def _put(param: Tensor, kind: str, value: Tensor) -> None:
    """Takes this rank's part of a parameter's whole state."""
    import deepspeed.utils as access

    if hasattr(param, "ds_tensor"):
        part = _part(value, param.ds_tensor.numel())
        if kind == MASTER:
            access.safe_set_local_fp32_param(param, part)
        else:
            access.safe_set_local_optimizer_state(param, part, kind)
    elif kind == MASTER:
        access.safe_set_full_fp32_param(param, value)
    else:
        access.safe_set_full_optimizer_state(param, value, kind)


def _part(value: Tensor, length: int) -> Tensor:
    """This rank's ``length`` elements; the last ranks' are filled up with zeros."""
    start = torch.distributed.get_rank() * length
    part = value.reshape(-1)[start : start + length]
    return torch.nn.functional.pad(part, (0, length - len(part)))


def _weights_divided(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _flat_parts(zero: Any) -> list[Tensor]:
    """This rank's fp32 parts, one for each call of ``step``."""
    flat: list[Tensor] = (
        zero.fp32_partitioned_groups_flat if _weights_divided(zero) else zero.single_partition_of_fp32_groups
    )
    return flat
