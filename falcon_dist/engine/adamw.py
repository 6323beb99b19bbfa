"""AdamW with exact fp32 state for weights of any dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from falcon_dist.engine.named import NamedOptimizer

PIECE = 1 << 18
"""Elements updated at once: master, moments and gradient together are 4 MiB in fp32."""
STATE_NAMES = ("master", "exp_avg", "exp_avg_sq")


class MasterAdamW(NamedOptimizer):
    """AdamW (arXiv:1711.05101) whose master weights and moments are fp32; torch's fused kernel does the step.

    A bf16 weight keeps an fp32 master beside it and is that master, rounded, after each step; an fp32
    weight is its own master. Parameters are named, so that the state can be kept without their order.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._divisor = 1.0

    def clip(self, norm: float, max_norm: float) -> None:
        """The next step takes the gradients as if scaled down to ``max_norm``, ``norm`` being what they have.

        They are divided as they are read, in fp32: no pass of its own, and bf16 gradients are not rounded once more.
        """
        self._divisor = max(1.0, (norm + 1e-6) / max_norm)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "re-evaluating the loss is not supported"
        self.steps += 1
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        self._divisor = 1.0

    def _update(self, param: torch.Tensor, group: Mapping[str, Any]) -> None:
        """Goes through the parameter in pieces that stay in the cache between one pass and the next."""
        state = self._state(param)
        tensors = [param, param.grad, state.get("master", param), state["exp_avg"], state["exp_avg_sq"]]
        assert param.is_contiguous()
        for piece in zip(*(t.reshape(-1).split(PIECE) for t in tensors), strict=True):  # type: ignore[union-attr]
            self._update_piece(piece, group)

    def _update_piece(self, piece: tuple[torch.Tensor, ...], group: Mapping[str, Any]) -> None:
        param, grad, master, exp_avg, exp_avg_sq = piece
        torch._fused_adamw_(
            [master],
            [grad.to(torch.float32)],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.tensor(float(self.steps), dtype=torch.float32)],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None if self._divisor == 1.0 else torch.tensor(self._divisor, dtype=torch.float32),
        )
        if master.dtype != param.dtype:
            param.copy_(master)

    def _state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[param]
        if not state:
            if param.dtype != torch.float32:
                state["master"] = param.detach().to(torch.float32)
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        return state

    def load_named_state(
        self, names: Mapping[torch.Tensor, str], state: Mapping[str, torch.Tensor], steps: int
    ) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                kinds = STATE_NAMES if param.dtype != torch.float32 else STATE_NAMES[1:]
                keys = {kind: f"{kind}/{names[param]}" for kind in kinds}
                if not state.keys().isdisjoint(keys.values()):  # else it has never had a gradient
                    self.state[param] = {kind: state[key] for kind, key in keys.items()}
        self.steps = steps


def decayed_groups(named: Iterable[tuple[str, torch.Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay, vectors (norms and biases) do not."""
    matrices: list[torch.Tensor] = []
    vectors: list[torch.Tensor] = []
    for _, param in named:
        (matrices if param.ndim >= 2 else vectors).append(param)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
