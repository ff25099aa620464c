"""The sparse optimizers for data-parallel tables, which have a dense gradient and no fused kernel.

Same formulas and same states as the fused kernels, on the touched rows only, so that a table may
move between data-parallel and sharded without changing what training does.
"""

# Shapes: R rows, D embedding dim.

from collections.abc import Callable, Iterable, Mapping

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
            self.state[weight]["step"] += 1
            # Elsewhere than on CPU, to know which rows are touched would be to wait for the device.
            update = self._update_some if weight.device.type == "cpu" else self._update_all
            update(weight, group["lr"])

    def _update_some(self, weight: nn.Parameter, lr: float) -> None:
        """Compute with the touched rows only."""
        assert weight.grad is not None
        rows = weight.grad.any(dim=1).nonzero().squeeze(1)
        states = self._states(weight)
        old = {name: state[rows] for name, state in states.items()}
        step = float(self.state[weight]["step"])
        change_RD, new = self._change(weight.detach()[rows], weight.grad[rows], old, lr, step)
        weight.detach()[rows] += change_RD
        for name, state in states.items():
            state[rows] = new[name]

    def _update_all(self, weight: nn.Parameter, lr: float) -> None:
        """Compute with all rows, and keep those without a gradient."""
        assert weight.grad is not None
        touched_R1 = weight.grad.any(dim=1, keepdim=True)
        states, step = self._states(weight), float(self.state[weight]["step"])
        change_RD, new = self._change(weight.detach(), weight.grad, states, lr, step)
        weight.detach().add_(change_RD.masked_fill_(~touched_R1, 0.0))
        for name, state in states.items():
            touched = touched_R1 if state.dim() > 1 else touched_R1.squeeze(1)
            state.copy_(torch.where(touched, new[name], state))

    def _states(self, weight: nn.Parameter) -> dict[str, Tensor]:
        return {name: self.state[weight][name] for name in STATE_NAMES[self._config.kind]}

    def _change(
        self,
        weight_RD: Tensor,
        grad_RD: Tensor,
        states: Mapping[str, Tensor],
        lr: float,
        step: float,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is added to the rows, and their new states."""
        match self._config:
            case Sgd():
                return -lr * grad_RD, {}
            case RowWiseAdagrad(eps=eps, weight_decay=decay):
                grad_RD = grad_RD + decay * weight_RD
                sum_R = states["momentum1"] + grad_RD.square().mean(dim=1)
                return -lr * grad_RD / (sum_R.sqrt() + eps).unsqueeze(1), {"momentum1": sum_R}
            case Adagrad(eps=eps):
                sum_RD = states["momentum1"] + grad_RD.square()
                return -lr * grad_RD / (sum_RD.sqrt() + eps), {"momentum1": sum_RD}
            case Adam(beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay):
                first = beta1 * states["momentum1"] + (1 - beta1) * grad_RD
                second = beta2 * states["momentum2"] + (1 - beta2) * grad_RD.square()
                unbiased_first, unbiased_second = (
                    first / (1 - beta1**step),
                    second / (1 - beta2**step),
                )
                direction_RD = unbiased_first / (unbiased_second.sqrt() + eps)
                change_RD = -lr * (direction_RD + decay * weight_RD)
                return change_RD, {"momentum1": first, "momentum2": second}
