"""Training metrics as sums: add them over batches and ranks, then read the values."""

# Shapes: B samples, T tasks, X sums kept per task.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ranking.tasks import probabilities

NUM_BINS = 4096
"""Bins of the score histogram that AUC is computed from."""
LOGIT_RANGE = 12.0
"""Logits beyond +-12 (probabilities beyond 6e-6) share the outermost bins."""

_WEIGHT, _POSITIVES, _PREDICTED, _CROSS_ENTROPY = range(4)
_HISTOGRAM = 4


@dataclass(frozen=True)
class TaskValues:
    """The metrics of one task; None where they are not defined (no rows, or one class only)."""

    weight: float
    label_rate: float | None
    logloss: float | None
    ne: float | None
    """Logloss divided by the entropy of the label rate; below 1 beats predicting the mean."""
    calibration: float | None
    """Sum of predictions / sum of labels."""
    auc: float | None
    auc_error_bound: float | None
    """|auc - exact auc| is at most this: pairs that share a bin count as ties."""


class MetricSums:
    """Sums of one window of training for every task; float64, on the device of the logits."""

    def __init__(self, sums_TX: Tensor) -> None:
        self.sums_TX = sums_TX

    @classmethod
    def zeros(cls, num_tasks: int, device: torch.device) -> "MetricSums":
        """An empty window."""
        shape = (num_tasks, _HISTOGRAM + 2 * NUM_BINS)
        return cls(torch.zeros(shape, dtype=torch.float64, device=device))

    def __add__(self, other: "MetricSums") -> "MetricSums":
        return MetricSums(self.sums_TX + other.sums_TX)

    def update(self, logits_BT: Tensor, labels_BT: Tensor, weights_BT: Tensor) -> None:
        """Add a batch; rows of weight 0 do not count. Waits for no device."""
        logits_BT, labels_BT = logits_BT.double(), labels_BT.double()
        weights_BT = weights_BT.double()
        cross_entropy_BT = nn.functional.binary_cross_entropy_with_logits(
            logits_BT, labels_BT, weights_BT, reduction="none"
        )
        positives_BT = weights_BT * labels_BT
        predicted_BT = weights_BT * probabilities(logits_BT)
        sums = (weights_BT, positives_BT, predicted_BT, cross_entropy_BT)
        for column, values_BT in enumerate(sums):
            self.sums_TX[:, column] += values_BT.sum(dim=0)
        # A NaN shows in the cross-entropy; here it must not become an index.
        scaled_BT = (logits_BT.nan_to_num() + LOGIT_RANGE) * (NUM_BINS / (2 * LOGIT_RANGE))
        bins_TB = scaled_BT.clamp_(0, NUM_BINS - 1).long().t()
        self._histogram(0).scatter_add_(1, bins_TB, positives_BT.t())
        self._histogram(1).scatter_add_(1, bins_TB, (weights_BT - positives_BT).t())

    def values(self) -> list[TaskValues]:
        """The metrics of every task."""
        heads = self.sums_TX[:, :_HISTOGRAM].tolist()
        return [
            _values(head, positives_X, negatives_X)
            for head, positives_X, negatives_X in zip(
                heads, self._histogram(0).cpu(), self._histogram(1).cpu(), strict=True
            )
        ]

    def _histogram(self, negative: int) -> Tensor:
        start = _HISTOGRAM + negative * NUM_BINS
        return self.sums_TX[:, start : start + NUM_BINS]


def all_reduce_sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of float64 tensors over all ranks, in one message; without a group, the tensors."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def normalized_entropy(logloss: float, label_rate: float) -> float | None:
    """Logloss / entropy of the label rate; None where the labels are all equal."""
    if not 0 < label_rate < 1:
        return None
    entropy = -label_rate * math.log(label_rate) - (1 - label_rate) * math.log1p(-label_rate)
    return logloss / entropy


def _values(head: Sequence[float], positives_X: Tensor, negatives_X: Tensor) -> TaskValues:
    weight, positives = head[_WEIGHT], head[_POSITIVES]
    if weight == 0:
        return TaskValues(0.0, None, None, None, None, None, None)
    logloss, rate = head[_CROSS_ENTROPY] / weight, positives / weight
    pairs = float(positives_X.sum() * negatives_X.sum())
    below_X = negatives_X.cumsum(0) - negatives_X
    ties = 0.5 * float((positives_X * negatives_X).sum())
    return TaskValues(
        weight=weight,
        label_rate=rate,
        logloss=logloss,
        ne=normalized_entropy(logloss, rate),
        calibration=head[_PREDICTED] / positives if positives else None,
        auc=(float((positives_X * below_X).sum()) + ties) / pairs if pairs else None,
        auc_error_bound=ties / pairs if pairs else None,
    )
