"""Drift and the decision to fit again."""

import numpy as np
import pytest
from vector_sets import clustered

from multimodal.codes import refit as refit_module
from multimodal.codes.config import Codes, RefitPolicy, Rq
from multimodal.codes.figures import Drift
from multimodal.codes.refit import (
    CodesInUse,
    age_in_days,
    decide_refit,
    measure_drift,
    refit,
)
from multimodal.codes.residual_quantizer import ResidualCodebooks
from multimodal.codes.store import Codebooks

CONFIG = Codes(rq=Rq(num_levels=2, codebook_size=32), vq=None)
X = clustered(3000)


def drift_of(new: np.ndarray) -> Drift:
    """Of a day that has the fitted items, too."""
    fitted = refit(CONFIG, np.arange(len(X)), X)
    books = fitted.codebooks.residual
    assert books
    vectors = np.concatenate([X, new])
    codes = books.encode(vectors)
    is_new = np.arange(len(codes)) >= len(X)
    in_use = CodesInUse(codes, is_new, books.level_sizes)
    return measure_drift(fitted.codebooks, fitted.reference_mse, vectors, in_use, age_days=3)


def test_new_items_like_the_fitted_ones_are_no_drift() -> None:
    drift = drift_of(clustered(500, seed=5))

    assert drift.error_ratio == pytest.approx(1, abs=0.1)
    assert drift.utilisation_ratio == pytest.approx(1, abs=0.1)
    assert not decide_refit(drift, RefitPolicy()).refit


def test_drift_is_told_from_codes_without_looking_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = refit(CONFIG, np.arange(len(X)), X)
    books = fitted.codebooks.residual
    assert books
    assert fitted.reference_mse is not None
    vectors, is_new = clustered(400, seed=6), np.arange(400) % 3 > 0
    expected = books.squared_errors(vectors[is_new])[-1] / fitted.reference_mse
    in_use = CodesInUse(books.encode(vectors), is_new, books.level_sizes)
    monkeypatch.delattr(ResidualCodebooks, "_encode_blocks")
    monkeypatch.setattr(refit_module, "ROWS_PER_BLOCK", 60)

    drift = measure_drift(fitted.codebooks, fitted.reference_mse, vectors, in_use, age_days=3)

    assert drift.error_ratio == pytest.approx(expected, rel=1e-6)
    assert drift.num_new_items == is_new.sum()


def test_items_of_another_kind_call_for_a_refit() -> None:
    rng = np.random.default_rng(0)
    other = rng.standard_normal((300, 16)).astype(np.float32)
    other /= np.linalg.norm(other, axis=1, keepdims=True)

    decision = decide_refit(drift_of(other), RefitPolicy())

    assert decision.refit
    assert "300 new items have" in decision.reasons[0]


def test_new_items_that_crowd_into_few_codewords_call_for_a_refit() -> None:
    """They are of kinds that the fit knew, so their error is small; and the codewords that they
    leave out stay in use by items of before."""
    kinds = clustered(4000, seed=5)
    nearest = ((kinds[:, None] - X[:5]) ** 2).sum(axis=2)
    few = kinds[nearest.min(axis=1) < 0.35][:200]
    assert len(few) == 200

    drift = drift_of(few)
    decision = decide_refit(drift, RefitPolicy())

    assert drift.utilisation_ratio is not None
    assert drift.utilisation_ratio < 0.8
    assert decision.refit
    assert "200 new items use" in decision.reasons[-1]
    rare = drift.model_copy(update={"num_new_items": 99, "error_ratio": 1.0})
    assert not decide_refit(rare, RefitPolicy()).refit


def test_use_of_codewords_equals_draws_from_the_items_of_the_fit() -> None:
    rng = np.random.default_rng(1)
    fitted = np.minimum(rng.geometric(0.2, (900, 2)) - 1, 19).astype(np.int32)
    new = np.minimum(rng.geometric(0.5, (40, 2)) - 1, 19).astype(np.int32)
    drawn = np.mean(
        [
            [len(np.unique(fitted[rng.integers(0, 900, 40), level])) for level in (0, 1)]
            for _ in range(2000)
        ],
        axis=0,
    )
    expected = min(len(np.unique(new[:, level])) / drawn[level] for level in (0, 1))
    is_new = np.arange(940) < 40
    in_use = CodesInUse(np.concatenate([new, fitted]), is_new, (20, 20))

    drift = measure_drift(Codebooks(), None, np.empty((940, 4), np.float32), in_use, 1)

    assert drift.utilisation_ratio == pytest.approx(expected, rel=0.01)
    nobody = CodesInUse(fitted, np.zeros(900, np.bool_), (20, 20))
    assert measure_drift(Codebooks(), None, X[:900], nobody, 1).utilisation_ratio is None


def test_a_fit_without_held_out_items_says_that_its_error_bound_is_off() -> None:
    fitted = refit(CONFIG, np.arange(60), X[:60])
    assert fitted.reference_mse is None
    books = fitted.codebooks.residual
    assert books
    new = 5 * X[60:300]
    # Of the levels' use nothing is asked here.
    in_use = CodesInUse(books.encode(new), np.ones(len(new), np.bool_), ())
    drift = measure_drift(fitted.codebooks, fitted.reference_mse, new, in_use, 3)

    decision = decide_refit(drift, RefitPolicy())

    assert not decision.refit
    assert decision.reasons == (
        "max_error_ratio was not looked at: the fit had too few items to hold some out",
    )
    old = decide_refit(drift.model_copy(update={"age_days": 28}), RefitPolicy())
    assert old.refit
    assert len(old.reasons) == 2


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
