"""Exact metrics of finished predictions, from columns; vectorised over rows and groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from embedding.errors import UserError
from ranking.metrics import normalized_entropy
from ranking.task_metrics import ReliabilityBin, SliceMetrics, TaskMetrics

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
_EPS = 1e-12  # probabilities are kept this far from 0 and 1 in logloss, as float64 can hold
_NUM_RELIABILITY_BINS = 20


@dataclass(frozen=True)
class GroupedAuc:
    """Sums of impression-weighted GAUC."""

    weighted_auc: float = 0.0
    weight: float = 0.0
    """Impressions (sum of row weights) of the groups with both classes."""
    num_groups: int = 0
    num_skipped_groups: int = 0

    @property
    def value(self) -> float | None:
        """Impression-weighted mean AUC; None without a group of both classes."""
        return self.weighted_auc / self.weight if self.weight else None


class _SortedRows:
    """Rows by score, and by group and score: sorted once, whatever the slices."""

    def __init__(
        self, labels: Floats, probs: Floats, weights: Floats, groups: npt.NDArray[Any]
    ) -> None:
        self._order = np.argsort(probs, kind="stable")
        self.labels, self.probs = labels[self._order], probs[self._order]
        self.weights, self.groups = weights[self._order], groups[self._order]
        self._by_group = np.argsort(self.groups, kind="stable")

    def metrics(self, mask: Bools | None = None) -> SliceMetrics:
        """Of all rows, or of those that a mask over the rows as they were given chooses."""
        labels, probs, weights = self.labels, self.probs, self.weights
        by_group = self._by_group
        if mask is not None:
            mask = mask[self._order]
            labels, probs, weights = labels[mask], probs[mask], weights[mask]
            by_group = by_group[mask[by_group]]
        if len(labels) == 0:
            return SliceMetrics(num_rows=0, num_positives=0)
        total, positives = float(weights.sum()), float((weights * labels).sum())
        clipped = probs.clip(_EPS, 1 - _EPS)
        likelihoods = np.where(labels > 0.5, np.log(clipped), np.log1p(-clipped))
        logloss = float(-(weights * likelihoods).sum() / total)
        label_rate = positives / total
        one_group = np.zeros(len(labels), dtype=np.int8)
        gauc = _auc_of_sorted(
            self.groups[by_group],
            self.labels[by_group],
            self.probs[by_group],
            self.weights[by_group],
        )
        return SliceMetrics(
            num_rows=len(labels),
            num_positives=int((labels > 0.5).sum()),
            label_rate=label_rate,
            auc=_auc_of_sorted(one_group, labels, probs, weights).value,
            gauc=gauc.value,
            gauc_num_groups=gauc.num_groups,
            gauc_num_skipped_groups=gauc.num_skipped_groups,
            logloss=logloss,
            ne=normalized_entropy(logloss, label_rate),
            calibration=float((weights * probs).sum()) / positives if positives else None,
        )

    def reliability(self) -> list[ReliabilityBin]:
        """Bins of about equally many rows, by prediction."""
        if len(self.labels) == 0:
            return []
        shares = np.linspace(0, 1, _NUM_RELIABILITY_BINS + 1)[1:-1]
        edges = np.unique(np.quantile(self.probs, shares))
        bins = np.searchsorted(edges, self.probs, side="right")
        num_rows = np.bincount(bins)
        total, predicted, positives = (
            np.bincount(bins, weights=self.weights * x) for x in (1.0, self.probs, self.labels)
        )
        return [
            ReliabilityBin(
                num_rows=int(num_rows[i]),
                mean_prediction=float(predicted[i] / total[i]),
                label_rate=float(positives[i] / total[i]),
            )
            for i in np.flatnonzero(num_rows)
        ]


def evaluate_predictions(
    labels: npt.NDArray[Any],
    probs: npt.NDArray[Any],
    groups: npt.NDArray[Any],
    *,
    weights: npt.NDArray[Any] | None = None,
    slices: Mapping[str, npt.NDArray[np.bool_]] | None = None,
) -> TaskMetrics:
    """Metrics of one task over the rows whose label is observed.

    Args:
        labels: 0 or 1, NaN where not observed; (R,).
        probs: predicted probabilities, (R,).
        groups: group of every row for GAUC, any sortable type, (R,).
        weights: of the rows, (R,); a row of weight 0 counts as not observed. None: all are 1.
        slices: masks over the rows, by name.

    Raises:
        UserError: a prediction is NaN or outside [0, 1].
    """
    labels, probs = labels.astype(np.float64), probs.astype(np.float64)
    weights = np.ones(len(labels)) if weights is None else weights.astype(np.float64)
    observed = ~np.isnan(labels) & (weights > 0)
    labels, probs, groups = labels[observed], probs[observed], groups[observed]
    wrong = ~((probs >= 0) & (probs <= 1))
    if wrong.any():
        raise UserError(
            f"{int(wrong.sum())} of {len(wrong)} predictions are not probabilities (the first is "
            f"{probs[wrong][0]}); the model has diverged: lower its learning rates"
        )
    rows = _SortedRows(labels, probs, weights[observed], groups)
    return TaskMetrics(
        **rows.metrics().model_dump(),
        slices={name: rows.metrics(mask[observed]) for name, mask in (slices or {}).items()},
        reliability=rows.reliability(),
    )


def _auc_of_sorted(
    groups: npt.NDArray[Any], labels: Floats, scores: Floats, weights: Floats
) -> GroupedAuc:
    """AUC inside every group of rows, at least one, sorted by group, and by score within one."""
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
