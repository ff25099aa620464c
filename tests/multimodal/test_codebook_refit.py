"""Drift and the decision to fit again."""

import numpy as np
import pytest
from vector_sets import clustered

from multimodal.code_metrics import CodeMetrics, measure_codes
from multimodal.codebook_refit import Drift, age_in_days, decide_refit, measure_drift, refit
from multimodal.codes_config import Codes, RefitPolicy, Rq

CONFIG = Codes(rq=Rq(num_levels=2, codebook_size=32), vq=None)
X = clustered(3000)


def drift_of(new: np.ndarray, everything: np.ndarray) -> Drift:
    fitted = refit(CONFIG, np.arange(len(X)), X)
    books = fitted.codebooks.residual
    assert books

    def metrics(x: np.ndarray) -> CodeMetrics:
        return measure_codes(x, books.encode(x), books)

    return measure_drift(
        fitted.codebooks, fitted.reference_mse, new, (metrics(X), metrics(everything)), age_days=3
    )


def test_new_items_like_the_fitted_ones_are_no_drift() -> None:
    new = clustered(500, seed=5)

    drift = drift_of(new, np.concatenate([X, new]))

    assert drift.error_ratio == pytest.approx(1, abs=0.1)
    assert drift.utilisation_ratio == 1
    assert not decide_refit(drift, RefitPolicy()).refit


def test_items_of_another_kind_and_unused_codewords_call_for_a_refit() -> None:
    rng = np.random.default_rng(0)
    other = rng.standard_normal((300, 16)).astype(np.float32)
    other /= np.linalg.norm(other, axis=1, keepdims=True)

    decision = decide_refit(drift_of(other, X[:20]), RefitPolicy())

    assert decision.refit
    assert "300 new items have" in decision.reasons[0]
    assert "of the codewords it used at the fit" in decision.reasons[1]


def test_the_schedule_and_its_limits() -> None:
    drift = Drift(age_days=28, num_new_items=99, error_ratio=3.0, utilisation_ratio=0.9)
    assert decide_refit(drift, RefitPolicy()).reasons == (
        "the codebooks are 28 days old (every_days=28)",
    )
    assert not decide_refit(drift, RefitPolicy(every_days=29)).refit
    assert decide_refit(drift, RefitPolicy(every_days=None, min_new_items=99)).refit
    assert age_in_days("2026-02-26", "2026-03-02") == 4


def test_reference_error_is_that_of_items_the_fit_did_not_see() -> None:
    whole = refit(CONFIG, np.arange(len(X)), X)
    sampled = CONFIG.model_copy(
        update={"rq": Rq(num_levels=2, codebook_size=32, points_per_codeword=60)}
    )
    part = refit(sampled, np.arange(len(X)), X)
    unseen = clustered(3000, seed=11)
    for fitted in (whole, part):
        assert fitted.codebooks.residual
        assert fitted.reference_mse
        error = fitted.codebooks.residual.squared_errors(unseen)[-1]
        assert fitted.reference_mse == pytest.approx(error, rel=0.1)
    assert whole.codebooks.residual
    assert whole.codebooks.residual.squared_errors(X)[-1] < whole.reference_mse  # type: ignore[operator]
    few = refit(CONFIG, np.arange(60), X[:60])
    assert few.reference_mse is None
