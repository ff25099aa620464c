"""One training step on the next batch: plain, or overlapped with copies and input dist on GPUs."""

from collections.abc import Collection, Iterator, MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from embedding.batch import RankingBatch
from embedding.tables import in_tables

# Shapes: B samples, T tasks.

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""(logits_BT, labels_BT, weights_BT, penalty) of a step."""


class StepOptimizer(Protocol):
    """What the loop needs of an optimizer: torch's and TorchRec's keyed ones have it."""

    @property
    def param_groups(self) -> Collection[MutableMapping[str, Any]]:
        """Groups with their learning rate as `lr`."""
        ...

    def zero_grad(self, set_to_none: bool = ...) -> None:
        """Forget the gradients."""

    def step(self) -> object:
        """Update the parameters."""


class PlainSteps:
    """Copy, forward, backward, update, one after the other."""

    def __init__(self, model: nn.Module, optimizer: StepOptimizer) -> None:
        self._model = model
        self._optimizer = optimizer

    def run(self, batches: Iterator[RankingBatch]) -> Outputs:
        """Train on the next batch."""
        self._optimizer.zero_grad(set_to_none=True)
        loss, outputs = self._model(next(batches))
        loss.backward()
        self._optimizer.step()
        return outputs

    def pause(self) -> None:
        """Let the model be called between two steps."""


class PipelinedSteps:
    """TorchRec's pipeline: batches are copied, and their ids sent, while earlier ones train."""

    def __init__(self, model: nn.Module, optimizer: StepOptimizer, device: torch.device) -> None:
        self._pipeline = TrainPipelineSparseDist(model, optimizer, device)

    def run(self, batches: Iterator[RankingBatch]) -> Outputs:
        """Train on the next batch."""
        outputs: Outputs = self._pipeline.progress(batches)
        return outputs

    def pause(self) -> None:
        """Let the model be called between two steps; batches under way wait for the next one."""
        self._pipeline.detach()


def make_steps(
    model: nn.Module, optimizer: StepOptimizer, device: torch.device, max_grad_norm: float | None
) -> PlainSteps | PipelinedSteps:
    """Steps for the device."""
    if max_grad_norm is not None:
        optimizer = _Clipped(optimizer, model, max_grad_norm)
    if device.type == "cuda":
        return PipelinedSteps(model, optimizer, device)
    return PlainSteps(model, optimizer)


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters outside the embedding tables."""
    return [p for name, p in model.named_parameters() if not in_tables(name)]


class _Clipped:
    """Clips the dense gradients before every step of the wrapped optimizer.

    Table gradients never exist as tensors (their optimizer is fused into backward), so their norm
    is not part of it.
    """

    def __init__(self, optimizer: StepOptimizer, model: nn.Module, max_norm: float) -> None:
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.parameters = dense_parameters(model)

    @property
    def param_groups(self) -> Collection[MutableMapping[str, Any]]:
        """Those of the wrapped optimizer."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Clip, then update."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
