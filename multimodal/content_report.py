"""What content vectors look like: nearest neighbours of a few items, and a map of many.

Shapes: N items, D columns of a vector, A items asked for, K neighbours.
"""

import numpy as np
from sklearn.manifold import TSNE

from embedding.raw_ids import Int64Array
from multimodal.codes.vectors import FloatArray

MAX_PERPLEXITY = 30.0
_ITEMS_PER_PERPLEXITY = 4
"""t-SNE needs more items than its perplexity; with few, neighbourhoods are smaller, too."""


def nearest_neighbours(
    vectors_ND: FloatArray, asked_A: Int64Array, num_neighbours: int
) -> Int64Array:
    """Rows (A, K) of the nearest items by cosine, nearest first, without the item itself.

    Args:
        vectors_ND: of all items.
        asked_A: rows of those whose neighbours are wanted.
        num_neighbours: K; at most the number of other items.
    """
    unit_ND = _unit(vectors_ND)
    cosines_AN = unit_ND[asked_A] @ unit_ND.T
    cosines_AN[np.arange(len(asked_A)), asked_A] = -np.inf
    count = min(num_neighbours, len(vectors_ND) - 1)
    nearest_AK: Int64Array = np.argsort(-cosines_AN, axis=1, kind="stable")[:, :count]
    return nearest_AK


def two_dimensional_map(vectors_ND: FloatArray, *, seed: int = 0) -> FloatArray:
    """t-SNE of the items by cosine, (N, 2) within [-1, 1]: near are alike, far means little.

    Its start is the principal components, so equal vectors give the same picture again.
    """
    num_items = len(vectors_ND)
    unit_ND = _unit(vectors_ND)
    if num_items <= _ITEMS_PER_PERPLEXITY:  # nothing to arrange
        padded = np.zeros((num_items, max(2, unit_ND.shape[1])), np.float32)
        padded[:, : unit_ND.shape[1]] = unit_ND
        return padded[:, :2]
    tsne = TSNE(
        perplexity=min(MAX_PERPLEXITY, (num_items - 1) / _ITEMS_PER_PERPLEXITY),
        init="pca",
        random_state=seed,
    )
    places_N2 = np.asarray(tsne.fit_transform(unit_ND))
    places_N2 = places_N2 - (places_N2.max(axis=0) + places_N2.min(axis=0)) / 2
    return np.asarray(places_N2 / max(float(np.abs(places_N2).max()), 1e-12), np.float32)


def likeness(vectors_ND: FloatArray, labels_N: Int64Array, num_neighbours: int = 10) -> float:
    """Share of nearest neighbours that have the item's own label; labels below 0 are unknown.

    The figure beside the map: a picture can flatter, this cannot.
    """
    known_N = np.flatnonzero(labels_N >= 0)
    if len(known_N) < 2:
        return float("nan")
    near_NK = nearest_neighbours(vectors_ND[known_N], np.arange(len(known_N)), num_neighbours)
    labels = labels_N[known_N]
    return float((labels[near_NK] == labels[:, None]).mean())


def spread_items(vectors_ND: FloatArray, count: int) -> Int64Array:
    """Rows of items that differ: each is the one farthest from those before it.

    The first is the farthest from the mean direction.
    """
    unit_ND = _unit(vectors_ND)
    nearest_N = unit_ND @ _unit(unit_ND.mean(axis=0, keepdims=True))[0]
    chosen: list[int] = []
    for _ in range(min(count, len(vectors_ND))):
        nearest_N[chosen] = np.inf
        chosen.append(int(nearest_N.argmin()))
        to_last_N = unit_ND @ unit_ND[chosen[-1]]
        nearest_N = to_last_N if len(chosen) == 1 else np.maximum(nearest_N, to_last_N)
    return np.array(chosen, np.int64)


def _unit(vectors_ND: FloatArray) -> FloatArray:
    length_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.asarray(vectors_ND / np.maximum(length_N1, 1e-12), np.float32)
