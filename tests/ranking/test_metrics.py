"""Metrics against sklearn and against loops over rows and pairs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from embedding.errors import UserError
from ranking.evaluation import evaluate_predictions
from ranking.metrics import MetricSums, all_reduce_sums
from ranking.task_metrics import SliceMetrics

CPU = torch.device("cpu")
TOLERANCE = 1e-10  # float64 sums of some thousand terms


def _rows(num_rows: int = 3000, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(-1, 1.5, num_rows).astype(np.float32).astype(np.float64)
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-logits))).astype(np.float64)
    weights = rng.integers(0, 3, num_rows).astype(np.float64)
    return logits, labels, weights


def _sums(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> MetricSums:
    sums = MetricSums.zeros(1, CPU)
    sums.update(*(torch.from_numpy(x).unsqueeze(1) for x in (logits, labels, weights)))
    return sums


def test_training_metrics_agree_with_sklearn() -> None:
    logits, labels, weights = _rows()
    probs = 1 / (1 + np.exp(-logits))
    value = _sums(logits, labels, weights).values()[0]
    assert value.logloss == pytest.approx(log_loss(labels, probs, sample_weight=weights))
    rate = np.average(labels, weights=weights)
    entropy = log_loss(labels, np.full(len(labels), rate), sample_weight=weights)
    assert value.ne == pytest.approx(log_loss(labels, probs, sample_weight=weights) / entropy)
    assert value.calibration == pytest.approx((weights * probs).sum() / (weights * labels).sum())
    exact = roc_auc_score(labels, probs, sample_weight=weights)
    assert value.auc is not None
    assert value.auc_error_bound is not None
    assert abs(value.auc - exact) <= value.auc_error_bound + TOLERANCE
    assert value.auc_error_bound < 1e-3


def test_auc_error_bound_holds_when_scores_are_crowded() -> None:
    logits, labels, weights = _rows()
    value = _sums(logits / 500, labels, weights).values()[0]
    exact = roc_auc_score(labels, logits, sample_weight=weights)
    assert value.auc is not None
    assert value.auc_error_bound is not None
    assert abs(value.auc - exact) <= value.auc_error_bound
    assert value.auc_error_bound > 1e-3  # the bound says so when bins are too coarse


def test_sums_of_parts_equal_the_whole() -> None:
    logits, labels, weights = _rows()
    whole = _sums(logits, labels, weights)
    parts = [
        _sums(*(x[start : start + 700] for x in (logits, labels, weights)))
        for start in range(0, 3000, 700)
    ]
    added = parts[0]
    for part in parts[1:]:
        added = added + part
    torch.testing.assert_close(added.sums_TX, whole.sums_TX, rtol=TOLERANCE, atol=TOLERANCE)


def test_tasks_do_not_mix() -> None:
    pairs = zip(_rows(), _rows(seed=1), strict=True)
    logits, labels, weights = (np.stack(pair, axis=1) for pair in pairs)
    both = MetricSums.zeros(2, CPU)
    both.update(*(torch.from_numpy(x) for x in (logits, labels, weights)))
    for task, seed in enumerate((0, 1)):
        alone = _sums(*_rows(seed=seed)).sums_TX[0]
        torch.testing.assert_close(both.sums_TX[task], alone, rtol=TOLERANCE, atol=TOLERANCE)


def test_undefined_metrics_are_none() -> None:
    empty = _sums(*(x * 0 for x in _rows())).values()[0]
    assert (empty.weight, empty.auc, empty.logloss) == (0, None, None)
    logits, _, weights = _rows()
    negative = _sums(logits, np.zeros_like(logits), weights).values()[0]
    assert (negative.auc, negative.ne, negative.calibration) == (None, None, None)
    assert negative.logloss is not None


def test_nan_logits_show_in_the_logloss() -> None:
    logits, labels, _ = _rows()
    logits[7] = math.nan
    value = _sums(logits, labels, np.ones_like(labels)).values()[0]
    assert value.logloss is not None
    assert math.isnan(value.logloss)


def test_all_reduce_without_a_group_returns_the_sums() -> None:
    a, b = torch.rand(2, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    first, second = all_reduce_sums([a, b])
    assert first.equal(a)
    assert second.equal(b)


# --- exact metrics -------------------------------------------------------------------------------


def _pair_auc(labels: list[float], scores: list[float], weights: list[float]) -> float | None:
    """AUC by looking at every pair."""
    right = pairs = 0.0
    for y, s, w in zip(labels, scores, weights, strict=True):
        for other_y, other_s, other_w in zip(labels, scores, weights, strict=True):
            if y == 1 and other_y == 0:
                pairs += w * other_w
                right += w * other_w * (1.0 if s > other_s else 0.5 if s == other_s else 0.0)
    return right / pairs if pairs else None


rows = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.sampled_from([0.0, 1.0]),
        st.sampled_from([0.1, 0.2, 0.5, 0.7]),
        st.sampled_from([0.5, 1.0, 3.0]),
        st.booleans(),
    ),
    max_size=30,
)
Row = tuple[int, float, float, float, bool]


@settings(max_examples=200)
@given(rows=rows)
def test_auc_and_gauc_equal_a_loop_over_pairs(rows: list[Row]) -> None:
    groups, labels, scores, weights, chosen = (np.array([row[i] for row in rows]) for i in range(5))
    found = evaluate_predictions(
        labels, scores, groups, weights=weights, slices={"chosen": chosen.astype(bool)}
    )
    _check_pairs(found, rows)
    _check_pairs(found.slices["chosen"], [row for row in rows if row[4]])


def _check_pairs(found: SliceMetrics, rows: list[Row]) -> None:
    groups, labels, scores, weights = ([row[i] for row in rows] for i in range(4))
    assert found.num_rows == len(rows)
    assert found.auc == pytest.approx(_pair_auc(labels, scores, weights))
    total = weight = 0.0
    skipped = 0
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        auc = _pair_auc(*([x[i] for i in members] for x in (labels, scores, weights)))
        impressions = sum(weights[i] for i in members)
        if auc is None:
            skipped += 1
        else:
            total, weight = total + impressions * auc, weight + impressions
    assert found.gauc == (pytest.approx(total / weight) if weight else None)
    assert found.gauc_num_skipped_groups == skipped


def test_evaluation_agrees_with_sklearn_on_observed_rows_and_slices() -> None:
    logits, labels, _ = _rows()
    probs = 1 / (1 + np.exp(-logits))
    groups = np.arange(3000) // 10
    with_gaps = labels.copy()
    with_gaps[::7] = np.nan
    cold = np.arange(3000) % 3 == 0
    metrics = evaluate_predictions(
        with_gaps, probs, groups, slices={"cold": cold, "none": cold & ~cold}
    )
    seen = ~np.isnan(with_gaps)
    y, p = labels[seen], probs[seen]
    assert metrics.num_rows == seen.sum()
    assert metrics.auc == pytest.approx(roc_auc_score(y, p))
    assert metrics.logloss == pytest.approx(log_loss(y, p))
    assert metrics.label_rate == pytest.approx(y.mean())
    assert metrics.calibration == pytest.approx(p.sum() / y.sum())
    in_slice = seen & cold
    assert metrics.slices["cold"].auc == pytest.approx(
        roc_auc_score(labels[in_slice], probs[in_slice])
    )
    for found, rows_in in ((metrics, seen), (metrics.slices["cold"], in_slice)):
        members = [np.flatnonzero(rows_in & (groups == group)) for group in np.unique(groups)]
        both = [rows for rows in members if len({*labels[rows]}) == 2]
        aucs = [roc_auc_score(labels[rows], probs[rows]) for rows in both]
        assert found.gauc == pytest.approx(np.average(aucs, weights=[len(rows) for rows in both]))
        skipped = sum(1 for rows in members if len(rows)) - len(both)
        assert (found.gauc_num_groups, found.gauc_num_skipped_groups) == (len(both), skipped)
    assert metrics.slices["none"].num_rows == 0
    assert metrics.slices["none"].auc is None


def test_weighted_evaluation_agrees_with_sklearn_and_with_repeated_rows() -> None:
    logits, labels, _ = _rows()
    probs = 1 / (1 + np.exp(-logits))
    groups = np.arange(3000) // 10
    weights = (np.arange(3000) % 4).astype(np.float32)
    cold = np.arange(3000) % 3 == 0
    found = evaluate_predictions(labels, probs, groups, weights=weights, slices={"cold": cold})

    seen = weights > 0
    y, p, w = labels[seen], probs[seen], weights[seen]
    assert found.num_rows == seen.sum()
    assert found.auc == pytest.approx(roc_auc_score(y, p, sample_weight=w))
    assert found.logloss == pytest.approx(log_loss(y, p, sample_weight=w))
    repeats = np.repeat(np.arange(3000), weights.astype(int))
    repeated = evaluate_predictions(
        labels[repeats], probs[repeats], groups[repeats], slices={"cold": cold[repeats]}
    )
    for one, other in ((found, repeated), (found.slices["cold"], repeated.slices["cold"])):
        for name in ("label_rate", "auc", "gauc", "gauc_num_groups", "ne", "calibration"):
            assert getattr(one, name) == pytest.approx(getattr(other, name)), name
    predicted = [b.mean_prediction * w for b, w in _bin_weights(found, probs[seen], w)]
    assert sum(predicted) == pytest.approx((w * p).sum())


def _bin_weights(found, probs, weights):
    """Every reliability bin with the weight of its rows."""
    order, start = np.argsort(probs, kind="stable"), 0
    for b in found.reliability:
        yield b, weights[order[start : start + b.num_rows]].sum()
        start += b.num_rows


def test_reliability_bins_cover_all_rows_and_match_a_loop() -> None:
    logits, labels, _ = _rows()
    probs = np.round(1 / (1 + np.exp(-logits)), 2)  # many ties
    bins = evaluate_predictions(labels, probs, np.zeros(3000)).reliability
    assert sum(b.num_rows for b in bins) == 3000
    assert len(bins) <= 20
    means = [b.mean_prediction for b in bins]
    assert means == sorted(means)
    order, start = np.argsort(probs, kind="stable"), 0
    for b in bins:
        members = order[start : start + b.num_rows]
        assert b.label_rate == pytest.approx(labels[members].mean())
        assert b.mean_prediction == pytest.approx(probs[members].mean())
        start += b.num_rows


def test_predictions_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(UserError, match="1 of 3 predictions are not probabilities"):
        evaluate_predictions(np.zeros(3), np.array([0.1, np.nan, 0.2]), np.zeros(3))
