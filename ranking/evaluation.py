"""Exact metrics of finished predictions, from columns; vectorised over rows and groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from embedding.errors import UserError
from ranking.metrics import normalized_entropy

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
_EPS = 1e-12  # probabilities are kept this far from 0 and 1 in logloss, as float64 can hold
_NUM_RELIABILITY_BINS = 20


class ReliabilityBin(BaseModel):
    """Rows of similar prediction: how often the label was 1."""

    model_config = ConfigDict(frozen=True)

    num_rows: int
    mean_prediction: float
    label_rate: float


class SliceMetrics(BaseModel):
    """Metrics of one task on some rows; None where they are not defined."""

    model_config = ConfigDict(frozen=True)

    num_rows: int
    """Rows whose label is observed."""
    label_rate: float | None = None
    auc: float | None = None
    """Weighted share of (positive, negative) pairs in the right order; ties count half."""
    gauc: float | None = None
    """AUC inside each group, averaged with the groups' impressions as weights. Groups of one class
    are left out and counted. Not torchrec's `gauc`, which is the unweighted mean."""
    gauc_num_groups: int = 0
    """Groups of both classes."""
    gauc_num_skipped_groups: int = 0
    logloss: float | None = None
    ne: float | None = None
    calibration: float | None = None
    """Sum of predictions / sum of labels."""


class TaskMetrics(SliceMetrics):
    """Metrics of one task, over all rows and by slice."""

    slices: dict[str, SliceMetrics] = {}
    reliability: list[ReliabilityBin] = []
    """Up to 20 bins of about equally many rows, for the calibration plot."""


@dataclass(frozen=True)
class GroupedAuc:
    """Sums of impression-weighted GAUC. They add up if no group is split between two of them."""

    weighted_auc: float = 0.0
    weight: float = 0.0
    """Impressions (sum of row weights) of the groups with both classes."""
    num_groups: int = 0
    num_skipped_groups: int = 0

    def __add__(self, other: "GroupedAuc") -> "GroupedAuc":
        return GroupedAuc(
            self.weighted_auc + other.weighted_auc,
            self.weight + other.weight,
            self.num_groups + other.num_groups,
            self.num_skipped_groups + other.num_skipped_groups,
        )

    @property
    def value(self) -> float | None:
        """Impression-weighted mean AUC; None without a group of both classes."""
        return self.weighted_auc / self.weight if self.weight else None


@dataclass(frozen=True)
class _Rows:
    labels: Floats
    probs: Floats
    groups: npt.NDArray[Any]

    def where(self, mask: Bools) -> "_Rows":
        return _Rows(self.labels[mask], self.probs[mask], self.groups[mask])


def evaluate_predictions(
    labels: npt.NDArray[Any],
    probs: npt.NDArray[Any],
    groups: npt.NDArray[Any],
    *,
    slices: Mapping[str, npt.NDArray[np.bool_]] | None = None,
) -> TaskMetrics:
    """Metrics of one task over the rows whose label is observed.

    Args:
        labels: 0 or 1, NaN where not observed; (R,).
        probs: predicted probabilities, (R,).
        groups: group of every row for GAUC, any sortable type, (R,).
        slices: masks over the rows, by name.

    Raises:
        UserError: a prediction is NaN or outside [0, 1].
    """
    labels, probs = labels.astype(np.float64), probs.astype(np.float64)
    observed = ~np.isnan(labels)
    rows = _Rows(labels, probs, groups).where(observed)
    wrong = ~((rows.probs >= 0) & (rows.probs <= 1))
    if wrong.any():
        raise UserError(
            f"{int(wrong.sum())} of {len(wrong)} predictions are not probabilities (the first is "
            f"{rows.probs[wrong][0]}); the model has diverged: lower its learning rates"
        )
    return TaskMetrics(
        **_metrics(rows).model_dump(),
        slices={
            name: _metrics(rows.where(mask[observed])) for name, mask in (slices or {}).items()
        },
        reliability=_reliability(rows),
    )


def exact_auc(labels: Floats, scores: Floats, weights: Floats) -> float | None:
    """Weighted AUC with ties counted half; None if one class is missing."""
    return grouped_auc(np.zeros(len(labels), dtype=np.int8), labels, scores, weights).value


def grouped_auc(
    groups: npt.NDArray[Any], labels: Floats, scores: Floats, weights: Floats
) -> GroupedAuc:
    """AUC inside every group, by one sort of all rows."""
    if len(groups) == 0:
        return GroupedAuc()
    order = np.lexsort((scores, groups))
    groups, scores, labels, weights = (x[order] for x in (groups, scores, labels, weights))
    group_starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    # Runs: rows of one group and one score, whose order among each other means nothing.
    is_run_start = np.r_[True, scores[1:] != scores[:-1]]
    is_run_start[group_starts] = True
    run_starts = np.flatnonzero(is_run_start)
    positives = np.add.reduceat(weights * labels, run_starts)
    negatives = np.add.reduceat(weights * (1 - labels), run_starts)
    first_runs = np.searchsorted(run_starts, group_starts)
    positives_of, negatives_of = (
        np.add.reduceat(runs, first_runs) for runs in (positives, negatives)
    )
    runs_of = np.diff(np.r_[first_runs, len(run_starts)])
    below = np.cumsum(negatives) - negatives
    below -= np.repeat(below[first_runs], runs_of)
    correct_of = np.add.reduceat(positives * (below + 0.5 * negatives), first_runs)
    pairs = positives_of * negatives_of
    valid = pairs > 0
    impressions = (positives_of + negatives_of)[valid]
    return GroupedAuc(
        weighted_auc=float((impressions * (correct_of[valid] / pairs[valid])).sum()),
        weight=float(impressions.sum()),
        num_groups=int(valid.sum()),
        num_skipped_groups=int((~valid).sum()),
    )


def _metrics(rows: _Rows) -> SliceMetrics:
    if len(rows.labels) == 0:
        return SliceMetrics(num_rows=0)
    weights = np.ones(len(rows.labels))
    positives = float(rows.labels.sum())
    probs = rows.probs.clip(_EPS, 1 - _EPS)
    likelihoods = np.where(rows.labels > 0.5, np.log(probs), np.log1p(-probs))
    logloss = float(-likelihoods.sum() / len(likelihoods))
    label_rate = positives / len(rows.labels)
    gauc = grouped_auc(rows.groups, rows.labels, rows.probs, weights)
    return SliceMetrics(
        num_rows=len(rows.labels),
        label_rate=label_rate,
        auc=exact_auc(rows.labels, rows.probs, weights),
        gauc=gauc.value,
        gauc_num_groups=gauc.num_groups,
        gauc_num_skipped_groups=gauc.num_skipped_groups,
        logloss=logloss,
        ne=normalized_entropy(logloss, label_rate),
        calibration=float(rows.probs.sum()) / positives if positives else None,
    )


def _reliability(rows: _Rows) -> list[ReliabilityBin]:
    if len(rows.labels) == 0:
        return []
    shares = np.linspace(0, 1, _NUM_RELIABILITY_BINS + 1)[1:-1]
    edges = np.unique(np.quantile(rows.probs, shares))
    bins = np.searchsorted(edges, rows.probs, side="right")
    num_rows = np.bincount(bins)
    predicted, positives = (np.bincount(bins, weights=x) for x in (rows.probs, rows.labels))
    return [
        ReliabilityBin(
            num_rows=int(num_rows[i]),
            mean_prediction=float(predicted[i] / num_rows[i]),
            label_rate=float(positives[i] / num_rows[i]),
        )
        for i in np.flatnonzero(num_rows)
    ]
