"""Uniform draws from the items that a user never rated, without rejection and without loops."""

# Shapes: B positives, K negatives of each, N negatives in all, P distinct (user, item) pairs.

from typing import Any

import numpy as np

from embedding.raw_ids import Int64Array

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


class UnratedItems:
    """For every user, the items 0 .. num_items - 1 that are not in the user's pairs.

    Memory is two int64 a distinct pair.
    """

    def __init__(self, users: Int64Array, items: Int64Array, num_items: int) -> None:
        self._num_items = num_items
        self._pairs_P = np.unique(users.astype(np.int64) * num_items + items)
        users_P, items_P = np.divmod(self._pairs_P, num_items)
        index_in_user = np.arange(len(users_P)) - np.searchsorted(
            self._pairs_P, users_P * num_items
        )
        # The number of unrated items below a rated one never falls along a user's items, so one
        # binary search finds how many rated items lie below the x-th unrated one.
        self._unrated_below_P = users_P * (num_items + 1) + (items_P - index_in_user)

    def draw(
        self, users_B: Int64Array, num_known: int, num_draws: int, rng: np.random.Generator
    ) -> tuple[Int64Array, BoolArray]:
        """Distinct unrated items below `num_known`, uniformly, for each of `users_B`.

        Returns:
            Items (B, K), and True (B, K) where there is one: a user who has rated almost all known
            items gets fewer than K.
        """
        users_B = users_B.astype(np.int64)
        start_B = np.searchsorted(self._pairs_P, users_B * self._num_items)
        rated_B = np.searchsorted(self._pairs_P, users_B * self._num_items + num_known) - start_B
        choices_B = num_known - rated_B
        count_B = np.minimum(choices_B, num_draws)
        place_BK = _distinct(choices_B, count_B, num_draws, rng)
        wanted_BK = users_B[:, None] * (self._num_items + 1) + place_BK
        skipped_BK = np.searchsorted(self._unrated_below_P, wanted_BK, side="right")
        return place_BK + skipped_BK - start_B[:, None], np.arange(num_draws) < count_B[:, None]


def _distinct(
    choices_B: Int64Array, count_B: Int64Array, width: int, rng: np.random.Generator
) -> Int64Array:
    """Floyd's sampling: `count` distinct numbers below `choices` in each row, any set alike."""
    drawn_BK = np.full((len(choices_B), width), -1, np.int64)
    for step in range(width):
        active = step < count_B
        top_B = np.where(active, choices_B - count_B + step, 0)
        pick_B = rng.integers(0, top_B + 1)
        taken = (drawn_BK[:, :step] == pick_B[:, None]).any(axis=1)
        drawn_BK[:, step] = np.where(active, np.where(taken, top_B, pick_B), -1 - step)
    return np.maximum(drawn_BK, 0)
