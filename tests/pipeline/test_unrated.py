import numpy as np
import pytest

from pipeline.adapters.unrated import UnratedItems


def test_draws_are_distinct_unrated_and_below_the_limit() -> None:
    rng = np.random.default_rng(0)
    num_users, num_items = 30, 25
    rated = rng.random((num_users, num_items)) < rng.random((num_users, 1))
    users, items = np.nonzero(rated)
    twice = np.concatenate([users, users]), np.concatenate([items, items])
    unrated = UnratedItems(*twice, num_items)
    for known in (1, 7, 25):
        asked = rng.integers(num_users, size=400)
        drawn, valid = unrated.draw(asked, known, 4, rng)
        for user, row, is_there in zip(asked, drawn, valid, strict=True):
            chosen = row[is_there].tolist()
            choices = set(np.flatnonzero(~rated[user, :known]).tolist())
            assert set(chosen) <= choices
            assert len(chosen) == len(set(chosen)) == min(4, len(choices))


def test_every_set_of_unrated_items_is_equally_likely() -> None:
    # User 0 has rated 1 and 3 of six items: the sets of two out of {0, 2, 4, 5} are six.
    unrated = UnratedItems(np.array([0, 0, 1]), np.array([1, 3, 5]), 6)
    asked = np.zeros(60_000, np.int64)
    drawn, _ = unrated.draw(asked, 6, 2, np.random.default_rng(1))
    sets, counts = np.unique(np.sort(drawn, axis=1), axis=0, return_counts=True)
    assert sets.tolist() == [[0, 2], [0, 4], [0, 5], [2, 4], [2, 5], [4, 5]]
    # Standard deviation of each count: sqrt(60000 * 1/6 * 5/6) = 91.
    assert counts == pytest.approx(10_000, abs=5 * 91)


def test_no_draws_asked_for_gives_none() -> None:
    drawn, valid = UnratedItems(np.array([0]), np.array([0]), 2).draw(
        np.array([0]), 2, 0, np.random.default_rng(0)
    )
    assert drawn.shape == valid.shape == (1, 0)
