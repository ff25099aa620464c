"""Some mined pairs to look at: drawn by a hash, so the same ones whatever the partitions."""

# Shapes: N pairs.

from collections.abc import Iterable

import numpy as np

from embedding.raw_ids import Int64Array, mix64
from multimodal.codes.vectors import FloatArray
from pipeline.codes.align_facts import PairSample

NUM_SAMPLED = 6
"""Pairs kept of each source."""


def sample_pairs(
    first_N: Int64Array, second_N: Int64Array, similarities_N: FloatArray
) -> PairSample:
    """`NUM_SAMPLED` pairs of different items, every pair as likely however often it occurs.

    (i, j) and (j, i) are one pair. The draw is a hash of both ids, and the smallest win, so samples
    of parts of the pairs can be joined (`join_samples`).
    """
    low, high = np.minimum(first_N, second_N), np.maximum(first_N, second_N)
    draws = mix64((mix64(low) ^ high.view(np.uint64)).view(np.int64))
    smallest = np.unique(draws)[:NUM_SAMPLED]
    if not len(smallest):
        return ()
    few = np.flatnonzero(draws <= smallest[-1])
    few = few[np.lexsort((-similarities_N[few], second_N[few], first_N[few], draws[few]))]
    _, at = np.unique(draws[few], return_index=True)
    return tuple(
        (int(first_N[row]), int(second_N[row]), float(similarities_N[row])) for row in few[at]
    )


def join_samples(samples: Iterable[PairSample]) -> PairSample:
    """The sample of all pairs from samples of their parts."""
    pairs = [pair for sample in samples for pair in sample]
    first, second = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    return sample_pairs(first, second, np.array([pair[2] for pair in pairs], np.float64))
