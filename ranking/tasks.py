"""Tasks that depend on each other: what a logit means, which labels count, what is a probability.

Every logit that leaves the model is the log-odds of the task's own probability over all rows, also
for a task that comes `after` another. So loss, metrics, calibration and serving treat all alike.
"""

# Shapes: B samples, T tasks.

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ranking.config import TaskConfig

_LARGEST_LOG = -1e-300  # log-probabilities stay below 0, so that 1 - p is not 0 in float64


def probabilities(logits_BT: Tensor) -> Tensor:
    """Probability of every task, over all rows, from the logits a `RankingModel` returns."""
    return logits_BT.sigmoid()


class TaskChain(nn.Module):
    """ESMM (arXiv 1804.07931): p(task) = p(parent) p(task | parent), along any chain of tasks.

    The heads give logits of p(task | parent). A product of probabilities has no gradient once it
    rounds to 0 or 1, so it is a sum of logarithms here, and comes out as a logit again.
    """

    def __init__(self, tasks: Sequence[TaskConfig]) -> None:
        super().__init__()
        self._parents = _parents(tasks)

    def forward(self, logits_BT: Tensor) -> Tensor:
        """Logits of p(task) from those of p(task | parent); (B, T), float32."""
        if not _any_after(self._parents):
            return logits_BT
        conditional = logits_BT.double().unbind(1)
        logs: dict[int, Tensor] = {}
        for task in _parents_first(self._parents):
            parent = self._parents[task]
            logs[task] = nn.functional.logsigmoid(conditional[task])
            if parent is not None:
                logs[task] = logs[task] + logs[parent]
        columns = [
            conditional[task] if parent is None else _logit_of_log(logs[task])
            for task, parent in enumerate(self._parents)
        ]
        return torch.stack(columns, dim=1).float()


class EntireSpaceLabels(nn.Module):
    """Labels with what follows from the parents' labels, and weights of the rows that have one.

    No purchase without a click: a label that is missing (NaN) counts as 0 where the parent's is 0,
    with the weight that the row has in the task itself, as if 0 were written there. Labels that are
    there are used as they are; what is still missing weighs 0.
    """

    def __init__(self, tasks: Sequence[TaskConfig]) -> None:
        super().__init__()
        self._parents = _parents(tasks)

    def forward(self, labels_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(labels, weights), both (B, T); 0 and 0 where a label is missing."""
        if _any_after(self._parents):
            labels = list(labels_BT.unbind(1))
            for task in _parents_first(self._parents):
                parent = self._parents[task]
                if parent is not None:
                    implied_B = labels[task].isnan() & (labels[parent] == 0)
                    labels[task] = labels[task].masked_fill(implied_B, 0.0)
            labels_BT = torch.stack(labels, dim=1)
        missing_BT = labels_BT.isnan()
        return labels_BT.masked_fill(missing_BT, 0.0), weights_BT.masked_fill(missing_BT, 0.0)


Parents = tuple[int | None, ...]
"""Index of the task that every task comes after."""


def _any_after(parents: Parents) -> bool:
    """Whether any task comes after another."""
    return any(parent is not None for parent in parents)


def _parents(tasks: Sequence[TaskConfig]) -> Parents:
    names = [task.name for task in tasks]
    return tuple(None if task.after is None else names.index(task.after) for task in tasks)


def _parents_first(parents: Parents) -> list[int]:
    def depth(task: int) -> int:
        parent = parents[task]
        return 0 if parent is None else 1 + depth(parent)

    return sorted(range(len(parents)), key=depth)


def _logit_of_log(log_B: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p."""
    log_B = log_B.clamp(max=_LARGEST_LOG)
    return log_B - (-torch.expm1(log_B)).log()
