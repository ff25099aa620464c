"""An exponential moving average of the dense weights, held as buffers beside them.

Running moments of batch norm are part of it: those of the weights do not belong to their average.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

AVERAGE = "average"
"""Name of the module in a `RankingStep`."""
_RANKER = "model.ranker."
_SEPARATOR = "/"  # a buffer's name may hold no dot
_MEAN, _VARIANCE = "running_mean", "running_var"


class DenseAverage(nn.Module):
    """The average of a module's parameters and running moments.

    Buffers are saved and restored with the model, need no gradient and are not sharded. Tables are
    not averaged: their rows are updated in backward, a few at a time.
    """

    def __init__(self, averaged: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        for name, tensor in _averaged(averaged):
            self.register_buffer(name.replace(".", _SEPARATOR), tensor.clone())

    @torch.no_grad()
    def update(self, averaged: nn.Module, step: int) -> None:
        """Add the weights after step `step` = 0, 1, ... of the run.

        Step 0 starts from the weights themselves, and the first steps forget faster: a short run,
        or one that starts from another model, is not held back by where it began.
        """
        decay = min(self.decay, step / (step + 9))
        tensors = [tensor for _, tensor in _averaged(averaged)]
        torch._foreach_lerp_(list(self.buffers()), tensors, 1 - decay)

    @contextmanager
    def in_use(self, averaged: nn.Module) -> Iterator[None]:
        """In the block, the module computes with its average."""
        before = [tensor.clone() for _, tensor in _averaged(averaged)]
        self.install(averaged)
        try:
            yield
        finally:
            _copy(before, averaged)

    def install(self, averaged: nn.Module) -> None:
        """Overwrite the module's parameters and running moments with their average."""
        _copy(list(self.buffers()), averaged)

    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """The averages of all running means, and of the variances that belong to them."""
        buffers = dict(self.named_buffers())
        means = [name for name in buffers if name.endswith(_MEAN)]
        variances = [name.removesuffix(_MEAN) + _VARIANCE for name in means]
        return [buffers[name] for name in means], [buffers[name] for name in variances]


def published_weights(dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of a `RankingStep` as they are served: averaged where there is one.

    Args:
        dense: by name in the `RankingStep`; tables left out.
    """
    prefix = f"{AVERAGE}."
    served = {name: tensor for name, tensor in dense.items() if not name.startswith(prefix)}
    for name, tensor in dense.items():
        if name.startswith(prefix):
            served[_RANKER + name.removeprefix(prefix).replace(_SEPARATOR, ".")] = tensor
    return served


def saved_average(name: str) -> str:
    """The buffer that holds the average of a parameter or running moment of a `RankingStep`."""
    return f"{AVERAGE}.{name.removeprefix(_RANKER).replace('.', _SEPARATOR)}"


@torch.no_grad()
def _copy(values: list[Tensor], module: nn.Module) -> None:
    torch._foreach_copy_([tensor for _, tensor in _averaged(module)], values)


def _averaged(module: nn.Module) -> list[tuple[str, Tensor]]:
    """All that is averaged, by name, without gradient: parameters, then running moments."""
    found = [(name, parameter.detach()) for name, parameter in module.named_parameters()]
    for prefix, norm in module.named_modules():
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            moments = ((_MEAN, norm.running_mean), (_VARIANCE, norm.running_var))
            found += [(f"{prefix}.{name}", m) for name, m in moments if m is not None]
    return found
