"""Random numbers as a pure function of (seed, stream, id): no state, any order, any chunk size.

A user's taste or an item's latent can thus be computed wherever it is needed, without a table of
all users in memory.
"""

import hashlib
from typing import Any

import numpy as np

from embedding.raw_ids import GOLDEN_GAMMA, Int64Array, finalised64

FloatArray = np.ndarray[Any, np.dtype[np.floating[Any]]]


class CounterRandom:
    """Draws for ids. Every `stream` name gives independent numbers."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def uniform(self, stream: str, ids: Int64Array, width: int = 1) -> FloatArray:
        """Uniform in (0, 1), shape (len(ids), width)."""
        name = hashlib.blake2b(f"{self._seed}/{stream}".encode(), digest_size=8).digest()
        key = int.from_bytes(name, "little")
        columns = np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
        rows = finalised64(
            np.asarray(ids).astype(np.uint64) * np.uint64(GOLDEN_GAMMA) + np.uint64(key)
        )
        bits = finalised64(rows[:, None] + columns[None, :])
        return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, stream: str, ids: Int64Array, width: int = 1) -> FloatArray:
        """Standard normal, shape (len(ids), width), by Box and Muller."""
        half = (width + 1) // 2
        draws = self.uniform(stream, ids, 2 * half)
        radius = np.sqrt(-2.0 * np.log(draws[:, :half]))
        angle = 2.0 * np.pi * draws[:, half:]
        return np.hstack([radius * np.cos(angle), radius * np.sin(angle)])[:, :width]

    def integers(self, stream: str, ids: Int64Array, high: int) -> Int64Array:
        """Integers in [0, high), shape (len(ids),)."""
        return (self.uniform(stream, ids)[:, 0] * high).astype(np.int64)
