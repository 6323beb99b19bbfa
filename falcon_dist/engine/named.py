"""What every optimizer of ours has in common: state that is kept by the parameters' names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer


class NamedOptimizer(Optimizer):
    """An optimizer whose state is saved and loaded under parameter names, without regard to their order."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.steps = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what ``state_dict`` gave, in the dtypes it has.

        torch's own method rounds floating state to the parameter's dtype, and accelerate calls it on
        every optimizer it wraps: bf16 weights would lose their fp32 state without a word.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        for param, index in zip(params, _indices(state_dict), strict=True):
            if index in state_dict["state"]:
                self.state[param] = dict(state_dict["state"][index])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})

    def named_state(self, names: Mapping[torch.Tensor, str]) -> dict[str, torch.Tensor]:
        """{"exp_avg/lm_head.weight": tensor, ...} of every parameter that was stepped; the tensors are not copied."""
        return {
            f"{kind}/{names[param]}": tensor for param, state in self.state.items() for kind, tensor in state.items()
        }

    @abstractmethod
    def load_named_state(
        self, names: Mapping[torch.Tensor, str], state: Mapping[str, torch.Tensor], steps: int
    ) -> None:
        """Takes what ``named_state`` gave, bit for bit.

        Raises:
            KeyError: of a parameter's state a part is missing.
        """


def _indices(state_dict: Mapping[str, Any]) -> list[int]:
    return [index for group in state_dict["param_groups"] for index in group["params"]]
