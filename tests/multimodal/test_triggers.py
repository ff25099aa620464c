"""User2Item triggers against a loop over histories."""

import numpy as np
import pytest

import multimodal.codes.triggers
from multimodal.codes.pair_config import User2Item
from multimodal.codes.triggers import IdVectors, trigger_pairs


@pytest.mark.parametrize("events_per_block", [1 << 18, 16])
def test_triggers_equal_a_loop(monkeypatch: pytest.MonkeyPatch, events_per_block: int) -> None:
    monkeypatch.setattr(multimodal.codes.triggers, "_EVENTS_PER_BLOCK", events_per_block)
    rng = np.random.default_rng(0)
    ids = rng.permutation(np.arange(30))  # items 30 .. 39 have no vector
    table = rng.standard_normal((30, 4)).astype(np.float32)
    table[3] = table[7] * 2  # equally similar to everything
    vectors = dict(zip(ids.tolist(), table, strict=True))
    targets = rng.integers(0, 40, 200)
    lengths = rng.integers(0, 12, 200)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    past = rng.integers(0, 40, offsets[-1])

    pairs = trigger_pairs(
        targets, offsets, past, IdVectors.of(ids, table), User2Item(max_history=6)
    )

    expected, no_vector, no_past, no_other = {}, 0, 0, 0
    for b, target in enumerate(targets.tolist()):
        history = past[offsets[b] : offsets[b + 1]][-6:].tolist()
        usable = [p for p in history if p in vectors and p != target]
        if target not in vectors:
            no_vector += 1
        elif not history:
            no_past += 1
        elif not usable:
            no_other += 1
        else:
            t = vectors[target] / np.linalg.norm(vectors[target])
            cosine = [float(t @ vectors[p] / np.linalg.norm(vectors[p])) for p in usable]
            expected[b] = (
                max(cosine),
                {p for p, c in zip(usable, cosine, strict=True) if c > max(cosine) - 1e-6},
                usable,
            )
    assert pairs.rows.tolist() == list(expected)
    assert pairs.targets.tolist() == targets[pairs.rows].tolist()
    for row, trigger, score in zip(
        pairs.rows.tolist(), pairs.triggers.tolist(), pairs.similarities.tolist(), strict=True
    ):
        assert score == pytest.approx(expected[row][0], abs=1e-5)
        assert trigger in expected[row][1]
    assert pairs.counts == {
        "target_without_vector": no_vector,
        "no_earlier_positive": no_past,
        "no_other_item_with_vector": no_other,
    }
    assert min(pairs.counts.values()) > 0


def test_the_latest_of_equally_similar_items_is_taken() -> None:
    table = IdVectors.of(np.array([1, 2, 3, 4]), np.eye(4, dtype=np.float32)[[0, 1, 1, 1]])
    pairs = trigger_pairs(
        np.array([4]), np.array([0, 4]), np.array([2, 3, 1, 4]), table, User2Item()
    )
    assert pairs.triggers.tolist() == [3]


def test_without_targets_or_vectors_nothing_is_found() -> None:
    none = np.empty(0, np.int64)
    empty = IdVectors.of(none, np.empty((0, 4), np.float32))
    assert not len(trigger_pairs(none, np.zeros(1, np.int64), none, empty, User2Item()).rows)
    pairs = trigger_pairs(np.array([5]), np.array([0, 1]), np.array([6]), empty, User2Item())
    assert pairs.counts["target_without_vector"] == 1


def test_fifty_earlier_positives_are_looked_at_unless_said_otherwise() -> None:
    """The item that the target equals lies 51 events back, another one like it 50 back."""
    table = IdVectors.of(np.arange(4), np.array([[1, 0], [1, 0], [0.9, 0.1], [0, 1]]))
    past = np.array([1, 2, *[3] * 49])
    for config, trigger in ((User2Item(), 2), (User2Item(max_history=51), 1)):
        pairs = trigger_pairs(np.array([0]), np.array([0, 51]), past, table, config)
        assert pairs.triggers.tolist() == [trigger]


def test_an_item_that_shares_its_row_with_the_target_is_no_trigger() -> None:
    """In a hashed table its vector is the target's own, and says nothing."""
    rows = np.array([0, 1, 0, 2])
    table = IdVectors.shared(np.array([40, 10, 20, 30]), rows, np.eye(3, dtype=np.float32))
    assert table.rows_of(np.array([10, 20, 30, 40, 50])).tolist() == [1, 0, 2, 0, -1]
    pairs = trigger_pairs(
        np.array([40, 40]), np.array([0, 2, 3]), np.array([10, 20, 20]), table, User2Item()
    )
    assert pairs.triggers.tolist() == [10]
    assert pairs.counts["no_other_item_with_vector"] == 1
