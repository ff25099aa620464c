"""Learning rates over the steps of a run: one factor on every optimizer's own base rates."""

import math
from collections.abc import Iterable, MutableMapping
from typing import Any, Protocol

from ranking.trainer_config import (
    Constant,
    CosineDecay,
    InverseSqrtDecay,
    LinearDecay,
    ScheduleConfig,
)


class HasParamGroups(Protocol):
    """An optimizer: torch's, or TorchRec's with its fused ones inside."""

    @property
    def param_groups(self) -> Iterable[MutableMapping[str, Any]]:
        """Groups with their learning rate as `lr`."""
        ...


def rate_factor(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """The factor of step `step` = 0, 1, ... of `num_steps`; plateau cuts are not part of it."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    since = step - config.warmup_steps
    match config.decay:
        case Constant():
            return 1.0
        case LinearDecay(num_steps=length, final_factor=final):
            return final + (1 - final) * (1 - _progress(since, length, config, num_steps))
        case CosineDecay(num_steps=length, final_factor=final):
            progress = _progress(since, length, config, num_steps)
            return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
        case InverseSqrtDecay(timescale_steps=timescale):
            return 1 / math.sqrt(1 + since / timescale)


class LearningRates:
    """Sets the rates of all parameter groups to their base rates times one factor.

    A fused TBE takes over its group's rate at `zero_grad`, which every step calls first. The base
    rate lies in the group as `initial_lr`, where torch keeps it, too: so it is saved with the
    dense optimizer, and a resume does not take a lowered rate for the base.
    """

    def __init__(self, optimizer: HasParamGroups) -> None:
        self._groups = list(optimizer.param_groups)
        self.factor: float | None = None
        """What was set last; None: nothing yet."""
        for group in self._groups:
            group.setdefault("initial_lr", group["lr"])

    def set(self, factor: float) -> None:
        """Scale all rates; does nothing where the factor has not changed."""
        if factor == self.factor:
            return
        for group in self._groups:
            group["lr"] = group["initial_lr"] * factor
        self.factor = factor


def _progress(since: int, length: int | None, config: ScheduleConfig, num_steps: int) -> float:
    """Share of the decay that is done."""
    length = length or num_steps - config.warmup_steps
    return min(since / length, 1.0) if length > 0 else 1.0
