"""The sparse optimizers for data-parallel tables, which have a dense gradient and no fused kernel.

Same formulas and same states as the fused kernels, on the touched rows only, so that a table may
move between data-parallel and sharded without changing what training does.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from embedding.config import Adagrad, Adam, RowWiseAdagrad, Sgd, SparseOptimizer

STATE_NAMES: Mapping[str, tuple[str, ...]] = {
    "row_wise_adagrad": ("momentum1",),
    "adagrad": ("momentum1",),
    "adam": ("momentum1", "momentum2"),
    "sgd": (),
}
"""Optimizer states of a table, in the order in which a TBE returns them."""


class RowOptimizer(torch.optim.Optimizer):
    """Updates the rows whose gradient is not zero, like a TBE; one parameter group per table."""

    def __init__(
        self, tables: Iterable[tuple[nn.Parameter, float]], optimizer: SparseOptimizer
    ) -> None:
        """`tables`: (weight, learning rate) of every table."""
        self._config = optimizer
        groups = [{"params": [weight], "lr": lr} for weight, lr in tables]
        super().__init__(groups, {"lr": optimizer.learning_rate})
        for group in self.param_groups:
            (weight,) = group["params"]
            for name in STATE_NAMES[optimizer.kind]:
                size = weight.shape[:1] if optimizer.kind == "row_wise_adagrad" else weight.shape
                self.state[weight][name] = torch.zeros(size, device=weight.device)
            self.state[weight]["step"] = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on all tables that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            (weight,) = group["params"]
            if weight.grad is None:
                continue
            state = self.state[weight]
            state["step"] += 1
            rows = weight.grad.any(dim=1).nonzero().squeeze(1)
            weight.detach()[rows] += self._change(weight, rows, state, group["lr"])

    def _change(self, weight: Tensor, rows: Tensor, state: dict[str, Any], lr: float) -> Tensor:
        assert weight.grad is not None
        grad = weight.grad[rows]
        match self._config:
            case Sgd():
                return -lr * grad
            case RowWiseAdagrad(eps=eps, weight_decay=decay):
                grad = grad + decay * weight.detach()[rows]
                state["momentum1"][rows] += grad.square().mean(dim=1)
                return -lr * grad / (state["momentum1"][rows].sqrt() + eps).unsqueeze(1)
            case Adagrad(eps=eps):
                state["momentum1"][rows] += grad.square()
                return -lr * grad / (state["momentum1"][rows].sqrt() + eps)
            case Adam():
                return self._adam_change(weight, rows, state, lr)

    def _adam_change(
        self, weight: Tensor, rows: Tensor, state: dict[str, Any], lr: float
    ) -> Tensor:
        assert isinstance(self._config, Adam)
        assert weight.grad is not None
        grad, step = weight.grad[rows], float(state["step"])
        beta1, beta2 = self._config.beta1, self._config.beta2
        first = beta1 * state["momentum1"][rows] + (1 - beta1) * grad
        second = beta2 * state["momentum2"][rows] + (1 - beta2) * grad.square()
        state["momentum1"][rows], state["momentum2"][rows] = first, second
        unbiased_first, unbiased_second = first / (1 - beta1**step), second / (1 - beta2**step)
        direction = unbiased_first / (unbiased_second.sqrt() + self._config.eps)
        return -lr * (direction + self._config.weight_decay * weight.detach()[rows])
