"""Named parameters with their AdamW: gradients as one vector, and state as named tensors."""

# Shapes: P elements of all parameters.

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from multimodal.content_config import ContentOptimizer

_PREFIX = "optimizer/"


class TrainedParameters:
    """What one optimizer of the content encoder trains; may be nothing."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        rate_of: Callable[[str], float],
        config: ContentOptimizer,
        device: torch.device,
    ) -> None:
        """`rate_of`: learning rate of a parameter, by its name."""
        self.named = dict(named)
        self._device = device
        self._max_norm = config.max_grad_norm
        self._gradient_P = self.gradient().zero_()
        """Of the last update, before it was clipped."""
        by_rate: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named.items():
            by_rate.setdefault(rate_of(name), []).append(parameter)
        self._optimizer: torch.optim.AdamW | None = None
        if self.named:
            self._optimizer = torch.optim.AdamW(
                [{"params": p, "lr": r, "initial_lr": r} for r, p in by_rate.items()],
                weight_decay=config.weight_decay,
                fused=device.type in ("cpu", "cuda"),
            )

    def clear_gradient(self) -> None:
        """Zero, whatever it was."""
        for parameter in self.named.values():
            parameter.grad = torch.zeros_like(parameter)

    def gradient(self) -> Tensor:
        """All gradients in one vector, (P,)."""
        parts = [
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
            for p in self.named.values()
        ]
        return torch.cat(parts) if parts else torch.empty(0, device=self._device)

    def update(self, gradient_P: Tensor, rate_factor: float) -> None:
        """Step with these gradients, clipped, and a factor on the learning rates."""
        if self._optimizer is None:
            return
        self._gradient_P = gradient_P
        if self._max_norm is not None:
            gradient_P = gradient_P * (self._max_norm / gradient_P.norm()).clamp(max=1.0)
        for parameter, part in zip(self.named.values(), self._parts(gradient_P), strict=True):
            parameter.grad = part.view_as(parameter)
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_factor
        self._optimizer.step()

    def gradient_norms(self, part_of: Callable[[str], str]) -> dict[str, float]:
        """Norm of the last update's gradient before clipping, by what `part_of` calls a parameter.

        Zero before the first update.
        """
        squares: dict[str, float] = {}
        each = [part.square().sum() for part in self._parts(self._gradient_P)]
        values = torch.stack(each).tolist() if each else []  # the device is waited for once
        for name, square in zip(self.named, values, strict=True):
            squares[part_of(name)] = squares.get(part_of(name), 0.0) + square
        return {part: square**0.5 for part, square in squares.items()}

    def _parts(self, gradient_P: Tensor) -> tuple[Tensor, ...]:
        return gradient_P.split([p.numel() for p in self.named.values()])

    def optimizer_state(self) -> dict[str, Tensor]:
        """State of the optimizer, by `optimizer/PARAMETER/KEY`."""
        if self._optimizer is None:
            return {}
        return {
            f"{_PREFIX}{name}/{key}": value
            for name, parameter in self.named.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from an `optimizer_state`; what it lacks starts anew."""
        if self._optimizer is None:
            return
        for name, parameter in self.named.items():
            prefix = f"{_PREFIX}{name}/"
            saved: dict[str, Any] = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
            if saved:
                # A scalar was saved as one element.
                self._optimizer.state[parameter] = {
                    key: (value.reshape(()) if key == "step" else value).to(self._device, copy=True)
                    for key, value in saved.items()
                }
