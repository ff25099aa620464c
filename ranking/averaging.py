"""An exponential moving average of the dense weights, held as buffers beside them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_MODULE = "average"
"""Name of the module in a `RankingStep`."""
_RANKER = "model.ranker."
_SEPARATOR = "/"  # a buffer's name may hold no dot


class DenseAverage(nn.Module):
    """The average of a module's parameters.

    Buffers are saved and restored with the model, need no gradient and are not sharded. Tables are
    not averaged: their rows are updated in backward, a few at a time.
    """

    def __init__(self, averaged: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        for name, parameter in averaged.named_parameters():
            self.register_buffer(name.replace(".", _SEPARATOR), parameter.detach().clone())

    @torch.no_grad()
    def update(self, averaged: nn.Module, step: int) -> None:
        """Add the weights after step `step` = 0, 1, ... of the run.

        Step 0 starts from the weights themselves, and the first steps forget faster: a short run,
        or one that starts from another model, is not held back by where it began.
        """
        decay = min(self.decay, step / (step + 9))
        weights = [parameter.detach() for parameter in averaged.parameters()]
        torch._foreach_lerp_(list(self.buffers()), weights, 1 - decay)

    @contextmanager
    def in_use(self, averaged: nn.Module) -> Iterator[None]:
        """In the block, the module computes with its average."""
        weights = [parameter.detach().clone() for parameter in averaged.parameters()]
        self.install(averaged)
        try:
            yield
        finally:
            _copy(weights, averaged)

    def install(self, averaged: nn.Module) -> None:
        """Overwrite the module's parameters with their average."""
        _copy(list(self.buffers()), averaged)


def published_weights(dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of a `RankingStep` as they are served: averaged where there is one.

    Args:
        dense: by name in the `RankingStep`; tables left out.
    """
    prefix = f"{_MODULE}."
    served = {name: tensor for name, tensor in dense.items() if not name.startswith(prefix)}
    for name, tensor in dense.items():
        if name.startswith(prefix):
            served[_RANKER + name.removeprefix(prefix).replace(_SEPARATOR, ".")] = tensor
    return served


@torch.no_grad()
def _copy(values: list[Tensor], module: nn.Module) -> None:
    torch._foreach_copy_([parameter.detach() for parameter in module.parameters()], values)
