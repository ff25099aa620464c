"""Slices of the evaluated rows, counted by hand."""

import numpy as np
import pytest

from pipeline.config import EvaluationConfig
from pipeline.evaluate import Slices

UNSEEN = 99


def rows_of(events: dict[int, int], **settings: float) -> dict[str, list[int]]:
    """Items of every slice, where each item of the counts and an unseen one has one row."""
    ids = np.array(sorted(events))
    counts = np.array([events[item] for item in sorted(events)])
    slices = Slices(ids, counts, np.array([1]), EvaluationConfig.model_validate(settings))
    shown = np.append(ids, UNSEEN)
    masks = slices.masks(shown, np.ones_like(shown))
    return {name: shown[mask].tolist() for name, mask in masks.items()}


@pytest.mark.parametrize(
    ("events", "settings", "expected"),
    [
        (  # 2 of 8 items are a quarter
            {1: 40, 2: 1, 3: 30, 4: 12, 5: 11, 6: 10, 7: 2, 8: 25},
            {"popular_share": 0.25, "rare_max_events": 10},
            {"popular": [1, 3], "middle": [4, 5, 8], "rare": [2, 6, 7]},
        ),
        (  # most items have one event: so does the quantile, and they are rare nevertheless
            {1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1, 10: 50},
            {"popular_share": 0.2, "rare_max_events": 10},
            {"popular": [10], "middle": [], "rare": [1, 2, 3, 4, 5, 6, 7, 8, 9]},
        ),
        (  # all alike: a share of them, those of the lowest ids
            {1: 20, 2: 20, 3: 20, 4: 20, 5: 20},
            {"popular_share": 0.4, "rare_max_events": 10},
            {"popular": [1, 2], "middle": [3, 4, 5], "rare": []},
        ),
        (  # fewer than one in ten: one
            {1: 20, 2: 30},
            {"popular_share": 0.1, "rare_max_events": 10},
            {"popular": [2], "middle": [1], "rare": []},
        ),
    ],
)
def test_every_item_is_in_one_slice(
    events: dict[int, int], settings: dict[str, float], expected: dict[str, list[int]]
) -> None:
    found = rows_of(events, **settings)

    assert found == {**expected, "cold": [UNSEEN], "new_users": []}
