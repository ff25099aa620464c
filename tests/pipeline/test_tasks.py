"""Bundles of small tasks."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.tasks import ROWS_PER_BUNDLE, bundles


@given(st.lists(st.integers(0, ROWS_PER_BUNDLE * 2)))
def test_bundles_hold_every_task_once_in_order_and_are_no_larger_than_needed(
    rows: list[int],
) -> None:
    found = bundles(rows)

    assert [i for bundle in found for i in bundle] == list(range(len(rows)))
    for bundle in found:
        assert sum(rows[i] for i in bundle[:-1]) < ROWS_PER_BUNDLE
    for bundle in found[:-1]:
        assert sum(rows[i] for i in bundle) >= ROWS_PER_BUNDLE
