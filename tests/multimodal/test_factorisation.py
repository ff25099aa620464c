"""Factors from blocks of users against a singular value decomposition of the whole matrix."""

from collections.abc import Iterator

import numpy as np
import pytest
from scipy.sparse import csr_array

from multimodal.codes.factorisation import Blocks, UserBlock, item_factors


def decaying(num_users: int, num_items: int, decay: float) -> np.ndarray:
    """A matrix with singular values 1, decay, decay^2, ...; nonzero everywhere."""
    rng = np.random.default_rng(0)
    rank = min(num_users, num_items)
    left = np.linalg.qr(rng.standard_normal((num_users, rank))).Q
    right = np.linalg.qr(rng.standard_normal((num_items, rank))).Q
    return (left * decay ** np.arange(rank)) @ right.T


def sparse(num_users: int, num_items: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.random((num_users, num_items)) * (rng.random((num_users, num_items)) < 0.1)


def blocks_of(matrix: np.ndarray, sizes: list[int]) -> Blocks:
    """Blocks of so many users, with the items that each has in an order of its own."""

    def read() -> Iterator[UserBlock]:
        start = 0
        for size in sizes:
            part = matrix[start : start + size]
            items = np.flatnonzero(part.any(axis=0))[::-1].copy()
            yield UserBlock(csr_array(part[:, items].astype(np.float32)), items)
            start += size
        assert start == len(matrix)

    return read


def expected_likeness(matrix: np.ndarray, dim: int) -> np.ndarray:
    """Inner products of items in the leading subspace: signs of singular vectors do not matter."""
    _, values, right = np.linalg.svd(matrix, full_matrices=False)
    factors = right[:dim].T * values[:dim]
    return factors @ factors.T


@pytest.mark.parametrize(
    ("matrix", "dim"),
    [
        (decaying(90, 60, 0.85), 12),
        (decaying(20, 60, 0.8), 15),
        (sparse(80, 24), 20),  # the whole space is searched
        (sparse(80, 24), 24),
        (sparse(5, 40), 4),
    ],
)
def test_factors_equal_the_truncated_decomposition(matrix: np.ndarray, dim: int) -> None:
    num_users, num_items = matrix.shape
    found = item_factors(blocks_of(matrix, [3, num_users - 3]), num_items, dim)

    assert found.shape == (num_items, dim)
    expected = expected_likeness(matrix, dim)
    # float32 sums, and what is left of the directions behind the subspace.
    np.testing.assert_allclose(found @ found.T, expected, atol=1e-4 * np.abs(expected).max())
    lengths = np.linalg.norm(found, axis=0)
    assert (np.diff(lengths) <= 1e-5 * lengths[0]).all(), "the largest first"


def test_how_users_are_cut_into_blocks_does_not_matter() -> None:
    matrix = sparse(60, 50)
    one = item_factors(blocks_of(matrix, [60]), 50, 10)
    many = item_factors(blocks_of(matrix, [1, 30, 9, 20]), 50, 10)
    np.testing.assert_allclose(one @ one.T, many @ many.T, atol=1e-4)
    assert np.array_equal(many, item_factors(blocks_of(matrix, [1, 30, 9, 20]), 50, 10))
