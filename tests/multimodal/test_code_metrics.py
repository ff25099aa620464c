"""Figures of codes against loops and hand-computed cases."""

import math
from collections import Counter

import numpy as np
import pytest
from vector_sets import clustered

from multimodal.codes.config import Rq
from multimodal.codes.metrics import collision_rate, measure_codes, perplexity, stability
from multimodal.codes.residual_fit import fit_residual


def test_collision_rate_counts_items_that_share_their_code() -> None:
    codes = np.array([[1, 2], [1, 2], [1, 3], [2, 2], [1, 2]], np.int32)
    assert collision_rate(codes) == 3 / 5
    assert collision_rate(codes[:0]) == 0


def test_perplexity_is_the_number_of_equally_used_codes() -> None:
    assert perplexity(np.array([5, 0, 5, 5])) == pytest.approx(3)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert perplexity(np.array([3, 1])) == pytest.approx(math.exp(entropy))


def test_measured_codes_equal_a_loop_over_items() -> None:
    x = clustered(600)
    books = fit_residual(x, Rq(num_levels=2, codebook_size=8))
    codes = books.encode(x)

    metrics = measure_codes(x, codes, books)

    rebuilt = books.decode(codes)
    counts = Counter(map(tuple, codes.tolist()))
    assert metrics.collision_rate == sum(n for n in counts.values() if n > 1) / 600
    assert metrics.largest_collision == max(counts.values())
    assert metrics.levels[1].mse == pytest.approx(((x - rebuilt) ** 2).sum(1).mean(), rel=1e-4)
    assert [level.utilisation for level in metrics.levels] == [1.0, 1.0]
    unit = rebuilt / np.linalg.norm(rebuilt, axis=1, keepdims=True)
    similar = unit @ x.T
    ranks = [(row > row[i] + 1e-6).sum() for i, row in enumerate(similar)]
    assert metrics.hit_rate_1 == np.mean([rank < 1 for rank in ranks])
    assert metrics.hit_rate_10 == np.mean([rank < 10 for rank in ranks])
    assert 0 < metrics.hit_rate_1 < metrics.hit_rate_10 < 1


def test_stability_of_prefixes_and_levels() -> None:
    before = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 0, 0]], np.int32)
    after = np.array([[0, 1, 2], [3, 9, 5], [9, 7, 8], [0, 0, 1]], np.int32)

    found = stability(before, after)

    assert found.prefixes == (0.75, 0.5, 0.25)
    assert found.levels == (0.75, 0.75, 0.75)
    assert found.full == 0.25
