"""Samples of pairs: equal for any partition, fair to frequent pairs, blind to order."""

import numpy as np

from pipeline.codes.pair_sample import NUM_SAMPLED, join_samples, sample_pairs


def pairs(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """400 pairs of 30 items, many of them twice and in both orders."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(-50, 50, (2, 400))
    return first, second, (first * second % 7 / 7).astype(np.float32)


def test_the_sample_does_not_depend_on_the_partitions() -> None:
    first, second, similarities = pairs()
    whole = sample_pairs(first, second, similarities)
    part = np.random.default_rng(1).integers(0, 5, len(first))
    own = [
        sample_pairs(first[part == p], second[part == p], similarities[part == p])
        for p in (3, 1, 0, 4, 2)
    ]
    assert join_samples(own) == whole
    assert join_samples([(), ()]) == ()
    assert len(whole) == NUM_SAMPLED
    assert len({frozenset(pair[:2]) for pair in whole}) == NUM_SAMPLED
    known = set(zip(first.tolist(), second.tolist(), similarities.tolist(), strict=True))
    assert set(whole) <= known


def test_a_pair_is_drawn_as_often_as_any_other_however_often_it_occurs() -> None:
    """40 pairs, of which one makes up nine tenths of the rows; 200 samples of other ids."""
    hits = 0
    for shift in range(200):
        first = np.concatenate([np.arange(40), np.zeros(360, np.int64)]) + 1000 * shift
        sample = sample_pairs(first, first + 100, np.ones(400, np.float32))
        hits += any(one == 1000 * shift for one, _, _ in sample)
    # 200 draws at 6 of 40: 30 expected, deviation 5.
    assert 10 < hits < 50
