"""Item vectors as the quantizers read them: an array in memory or a memory-mapped file.

Every reader goes through blocks of rows, so memory does not grow with the number of items.
"""

# Shapes: N items, D vector dim.

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embedding.errors import UserError
from embedding.raw_ids import mix64

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]
Float32Array = np.ndarray[Any, np.dtype[np.float32]]
Int32Array = np.ndarray[Any, np.dtype[np.int32]]
Int64Array = np.ndarray[Any, np.dtype[np.int64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

ROWS_PER_BLOCK = 1 << 16
_ROWS_PER_DIGEST = 1 << 14
_LEAST_VARIANCE = 1e-6
"""Of the mean's squared length: below it, fp32 distances of vectors are rounding errors."""


def blocks(vectors_ND: FloatArray, rows: int = ROWS_PER_BLOCK) -> Iterator[tuple[int, FloatArray]]:
    """First row and contents (fp32, contiguous) of consecutive blocks."""
    for start in range(0, len(vectors_ND), rows):
        yield start, np.ascontiguousarray(vectors_ND[start : start + rows], dtype=np.float32)


def check_vectors(vectors_ND: FloatArray) -> None:
    """Refuse vectors that no quantizer can learn from.

    Raises:
        UserError: no matrix of floats, no rows, values that are no numbers, or vectors that differ
            by rounding only, or not at all.
    """
    if vectors_ND.ndim != 2 or not np.issubdtype(vectors_ND.dtype, np.floating):
        raise UserError(
            f"item vectors must be a matrix of floats, items x dimensions, not {vectors_ND.dtype} "
            f"of shape {vectors_ND.shape}"
        )
    if not vectors_ND.size:
        raise UserError(f"there are no item vectors (shape {vectors_ND.shape}); encode items first")
    first = np.asarray(vectors_ND[0], np.float32)
    differs = False
    total_D, moved_D = np.zeros((2, vectors_ND.shape[1]))
    squares = 0.0
    for start, block_BD in blocks(vectors_ND):
        check_finite(block_BD, start)
        from_first_BD = block_BD - first
        differs = differs or bool(from_first_BD.any())
        total_D += block_BD.sum(axis=0, dtype=np.float64)
        moved_D += from_first_BD.sum(axis=0, dtype=np.float64)
        squares += float(np.square(from_first_BD, dtype=np.float64).sum())
    number = len(vectors_ND)
    if number == 1:
        return
    if not differs:
        raise UserError(
            f"all {number} item vectors are equal, so codes cannot tell items apart; the "
            "encoder has collapsed or reads no content: check its inputs and its learning rate"
        )
    # Around the first vector, sums keep the digits that are lost around 0.
    variance = squares / number - float(np.square(moved_D / number).sum())
    mean = float(np.square(total_D / number).sum())
    if variance < _LEAST_VARIANCE * mean:
        raise UserError(
            f"the {number} item vectors hardly differ: their variance is {variance / mean:.1e} of "
            "their mean's squared length, so codes would be made of rounding errors; the encoder "
            "has collapsed: check its inputs and its learning rate, or subtract the mean"
        )


def mean_cosine(vectors_ND: FloatArray) -> float:
    """Mean cosine of two different items: near 1, all vectors point the same way.

    0 for one item.
    """
    number, total_D, own = len(vectors_ND), np.zeros(vectors_ND.shape[1]), 0.0
    for _, block_BD in blocks(vectors_ND):
        unit_BD = unit_rows(block_BD)
        total_D += unit_BD.sum(axis=0, dtype=np.float64)
        own += float(np.square(unit_BD, dtype=np.float64).sum())
    if number < 2:
        return 0.0
    return float((np.square(total_D).sum() - own) / (number * (number - 1)))


def check_finite(block_BD: FloatArray, first_row: int) -> None:
    """Refuse NaN and infinity.

    Raises:
        UserError: naming the first such row.
    """
    # One sum is not finite if any term is not, and takes a fraction of the time of a mask.
    if np.isfinite(block_BD.sum(dtype=np.float64)):
        return
    bad = np.flatnonzero(~np.isfinite(block_BD).all(axis=1))
    raise UserError(
        f"item vector {first_row + int(bad[0])} holds NaN or infinity ({len(bad)} such rows in a "
        f"block of {len(block_BD)}); encode these items again, or leave them out so that they get "
        "no code"
    )


def row_digests(vectors_ND: FloatArray) -> Int64Array:
    """A number (N,) of the bytes of each row: another row has another one, but once in 2^64.

    Raises:
        UserError: a row holds NaN or infinity.
    """
    digests_N = np.empty(len(vectors_ND), np.int64)
    for start, block_BD in blocks(vectors_ND, rows=_ROWS_PER_DIGEST):
        check_finite(block_BD, start)
        word = np.uint32 if block_BD.shape[1] % 2 else np.uint64
        digest_B = np.zeros(len(block_BD), np.int64)
        for word_B in np.ascontiguousarray(block_BD.view(word).T).astype(np.uint64, copy=False):
            digest_B = mix64(digest_B ^ word_B.view(np.int64)).view(np.int64)
        digests_N[start : start + len(block_BD)] = digest_B
    return digests_N


def sample_rows(num_rows: int, size: int, seed: int) -> Int64Array:
    """`size` distinct rows in ascending order (all of them if there are no more)."""
    if size >= num_rows:
        return np.arange(num_rows)
    rows = np.random.default_rng(seed).choice(num_rows, size, replace=False, shuffle=False)
    return np.sort(rows)


def read_rows(vectors_ND: FloatArray, rows: Int64Array) -> Float32Array:
    """Some rows, fp32, in memory."""
    return np.ascontiguousarray(vectors_ND[rows], dtype=np.float32)


def rows_in_file(vectors_ND: FloatArray, rows: Int64Array, directory: Path) -> FloatArray:
    """Some rows, memory-mapped: copied a block at a time into a file that ends with the array.

    Args:
        vectors_ND: memory-mapped itself, or memory would hold it all the same.
        rows: ascending.
        directory: where the file, which has no name, takes room.
    """
    if not len(rows):
        return vectors_ND[:0]
    with tempfile.TemporaryFile(dir=directory) as file:
        shape = (len(rows), vectors_ND.shape[1])
        copy: FloatArray = np.memmap(file, vectors_ND.dtype, "w+", shape=shape)
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        copy[start : start + ROWS_PER_BLOCK] = vectors_ND[rows[start : start + ROWS_PER_BLOCK]]
    return copy


def unit_rows(vectors_ND: FloatArray) -> Float32Array:
    """Rows scaled to length 1; a zero row stays zero."""
    vectors = np.asarray(vectors_ND, np.float32)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)
