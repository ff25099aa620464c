"""A truncated SVD of a users x items matrix that is read block by block, for vectors of its items.

Memory holds one block and a few matrices of items x `dim`: it grows with the number of items, not
with that of users or events.
"""

# Shapes: B users of a block, I items of a block, N items, P columns of the subspace, D vector dim.

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from multimodal.codes.vectors import Float32Array, Int64Array

_OVERSAMPLING = 32
_NUM_PASSES = 12
"""With 32 dims of MovieLens 100K, 99.7% of the best of 50 items are those of the exact one."""


@dataclass(frozen=True)
class UserBlock:
    """Some users' rows of the matrix, each whole."""

    values_BI: csr_array
    """float32, columns of those items only that the block has."""
    items_I: Int64Array
    """Column of the whole matrix of each; distinct."""


Blocks = Callable[[], Iterator[UserBlock]]
"""Reads all blocks, in the same order at every call."""


def item_factors(blocks: Blocks, num_items: int, dim: int, seed: int = 0) -> Float32Array:
    """Right singular vectors times singular values, the largest first: (N, dim).

    Subspace iteration from a random start (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm
    4.4), then Rayleigh-Ritz in the subspace; the blocks are read once an iteration.

    Args:
        blocks: tile the matrix A.
        num_items: N.
        dim: D, at most N and the number of users.
        seed: of the start.
    """
    width = min(dim + _OVERSAMPLING, num_items)
    start_NP = np.random.default_rng(seed).standard_normal((num_items, width), dtype=np.float32)
    basis_NP = np.linalg.qr(start_NP).Q
    for _ in range(_NUM_PASSES):
        basis_NP = np.linalg.qr(_squared(blocks, basis_NP)).Q
    squares_P, rotation_PP = np.linalg.eigh(basis_NP.T @ _squared(blocks, basis_NP))
    largest = slice(None, -dim - 1, -1)  # eigh has the smallest first
    values_D = np.sqrt(np.maximum(squares_P[largest], 0))
    return np.asarray(basis_NP @ (rotation_PP[:, largest] * values_D), np.float32)


def _squared(blocks: Blocks, basis_NP: Float32Array) -> Float32Array:
    """A^T A times the basis, (N, P)."""
    product_NP = np.zeros_like(basis_NP)
    for block in blocks():
        values_BI = block.values_BI
        product_NP[block.items_I] += values_BI.T @ (values_BI @ basis_NP[block.items_I])
    return product_NP
