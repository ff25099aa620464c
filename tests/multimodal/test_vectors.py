"""Vectors that no codes can be made of."""

import numpy as np
import pytest
from vector_sets import clustered

from embedding.errors import UserError
from multimodal.codes.vectors import check_vectors, mean_cosine


def test_mean_cosine_equals_a_loop_over_pairs() -> None:
    x = clustered(60) + 0.3
    units = [row / np.linalg.norm(row) for row in x.astype(np.float64)]
    pairs = [float(a @ b) for i, a in enumerate(units) for b in units[:i]]
    assert mean_cosine(x) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert mean_cosine(x[:1]) == 0.0


@pytest.mark.parametrize(("spread", "is_refused"), [(0.1, False), (6e-3, False), (2e-3, True)])
def test_vectors_that_differ_by_rounding_only_are_refused(spread: float, is_refused: bool) -> None:
    """Around a common vector of length 4, with deviations of length `spread`: variance over the
    squared length of the mean is spread ** 2 / 16."""
    x = clustered(500)
    near = np.full(16, 1.0) + spread * (x - x.mean(axis=0))
    assert mean_cosine(near) > 0.999
    if is_refused:
        with pytest.raises(UserError, match=r"500 item vectors hardly differ.*collapsed"):
            check_vectors(near.astype(np.float32))
    else:
        check_vectors(near.astype(np.float32))


def test_vectors_around_nothing_may_be_as_small_as_they_like() -> None:
    check_vectors(1e-12 * clustered(500))
    check_vectors(clustered(1))
