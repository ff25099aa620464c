"""Neighbours and maps of content vectors on sets whose answer is known."""

import numpy as np
import pytest

from multimodal.content_report import (
    likeness,
    nearest_neighbours,
    spread_items,
    two_dimensional_map,
)


def clusters(num_clusters: int, each: int, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Well separated directions with a little noise, and the cluster of every item."""
    random = np.random.default_rng(0)
    centres = np.eye(dim, dtype=np.float32)[:num_clusters]
    labels = np.repeat(np.arange(num_clusters), each)
    noise = 0.05 * random.normal(size=(len(labels), dim))
    lengths = random.uniform(0.5, 5, size=(len(labels), 1))
    return ((centres[labels] + noise) * lengths).astype(np.float32), labels


def test_neighbours_are_those_of_a_loop_over_all_pairs() -> None:
    vectors, _ = clusters(3, 5)
    asked_A = np.array([4, 11])
    near_AK = nearest_neighbours(vectors, asked_A, 6)
    for row, asked in enumerate(asked_A):
        cosines = []
        for other, vector in enumerate(vectors):
            if other != asked:
                length = np.linalg.norm(vector) * np.linalg.norm(vectors[asked])
                cosines.append((-float(vector @ vectors[asked]) / length, other))
        expected = sorted(cosines)[:6]
        assert near_AK[row].tolist() == [other for _, other in expected]


def test_there_are_no_more_neighbours_than_other_items() -> None:
    vectors, _ = clusters(1, 3)
    assert nearest_neighbours(vectors, np.array([0]), 10).shape == (1, 2)


def test_the_map_keeps_clusters_together_and_repeats_itself() -> None:
    vectors, labels = clusters(4, 25)
    places = two_dimensional_map(vectors)
    assert places.shape == (100, 2)
    assert np.abs(places).max() == pytest.approx(1.0, abs=1e-5)
    distance = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (labels[distance.argmin(axis=1)] == labels).all()
    np.testing.assert_array_equal(two_dimensional_map(vectors), places)


@pytest.mark.parametrize("num_items", [0, 1, 4, 5])
def test_a_map_of_few_items_exists(num_items: int) -> None:
    vectors, _ = clusters(1, 5)
    assert two_dimensional_map(vectors[:num_items]).shape == (num_items, 2)


def test_likeness_is_the_share_of_neighbours_of_the_same_kind() -> None:
    vectors, labels = clusters(3, 12)
    assert likeness(vectors, labels) == 1.0
    mixed = np.arange(len(labels)) % 3
    assert likeness(vectors, mixed, 11) == pytest.approx(3 / 11)  # 4 of each kind in a cluster
    assert likeness(vectors, np.where(labels == 0, -1, labels)) == 1.0
    assert np.isnan(likeness(vectors, np.full(len(labels), -1)))


def test_chosen_items_come_from_different_clusters() -> None:
    vectors, labels = clusters(5, 8)
    assert sorted(labels[spread_items(vectors, 5)]) == [0, 1, 2, 3, 4]
    assert len(set(spread_items(vectors[:3], 10).tolist())) == 3
