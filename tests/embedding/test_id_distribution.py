"""Distributions in bins against exact sums over every row."""

from collections import OrderedDict

import numpy as np
import pytest

from embedding.planning.id_distribution import draw, from_counts, zipf


def exact(num_rows: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, num_rows + 1, dtype=float) ** -exponent
    return weights / weights.sum()


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.3])
@pytest.mark.parametrize("num_rows", [1, 2, 50, 20_000])
def test_bins_agree_with_every_row(num_rows: int, exponent: float) -> None:
    p = exact(num_rows, exponent)
    ids = zipf(num_rows, exponent)
    assert ids.total_rows == num_rows
    assert sum(ids.mass) == pytest.approx(1)
    for lookups in (1, 100, 50_000):
        expected = (1 - (1 - np.minimum(p, 1 - 1e-15)) ** lookups).sum()
        assert ids.expected_unique(lookups) == pytest.approx(expected, rel=0.02)
    for cached in (0, 1, num_rows // 10, num_rows):
        assert ids.share_of_hottest(cached) == pytest.approx(p[:cached].sum(), abs=0.02)


def test_counts_give_the_distribution_they_were_drawn_from() -> None:
    drawn = draw(zipf(1000, 1.0), 200_000, np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=1000)
    assert counts[0] / 200_000 == pytest.approx(exact(1000, 1.0)[0], rel=0.03)
    found = from_counts(counts)
    assert found.total_rows == (counts > 0).sum()
    assert found.share_of_hottest(100) == pytest.approx(exact(1000, 1.0)[:100].sum(), abs=0.01)


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("num_cached", [300, 1200])
def test_misses_are_those_of_a_cache_that_forgets_the_oldest_row(
    exponent: float, num_cached: int
) -> None:
    """Steps of 200 lookups of 3,000 rows; every row of a step comes in before any goes out."""
    ids = zipf(3000, exponent)
    rng = np.random.default_rng(0)
    cache: OrderedDict[int, None] = OrderedDict()
    missed = []
    for _ in range(600):
        rows = set(draw(ids, 200, rng).tolist())
        missed.append(len(rows - cache.keys()))
        for row in rows:
            cache[row] = None
            cache.move_to_end(row)
        while len(cache) > num_cached:
            cache.popitem(last=False)
    told = ids.missed_rows(num_cached, 200)
    assert told == pytest.approx(np.mean(missed[300:]), rel=0.03)
    # A cache of the hottest rows would miss fewer.
    p = exact(3000, exponent)[num_cached:]
    assert told > 1.1 * (1 - (1 - p) ** 200).sum()


def test_a_cache_of_all_rows_misses_none_and_an_empty_one_all() -> None:
    ids = zipf(1000, 1.0)
    assert ids.missed_rows(1000, 5000) == 0
    assert ids.missed_rows(0, 5000) == pytest.approx(ids.expected_unique(5000), rel=1e-3)
