"""The most similar of many items: exact by blocked matrix products, or approximate by faiss."""

# Shapes: N items, B queries of a block, D vector dim, G items of a group, k neighbours.

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import torch
from torch import Tensor, nn

from multimodal.codes.config import ExactIndex, HnswIndex, IndexBySize, IvfIndex, VqIndex
from multimodal.codes.exact_lookup import exact_products, rounding
from multimodal.codes.vectors import BoolArray, Float32Array, FloatArray, Int64Array, unit_rows

_GROUP = 128
_MAX_SCORES = 1 << 25
"""Scores in memory at once."""
_QUERIES_PER_BLOCK = {"cpu": 256, "cuda": 4096}
_MAX_CANDIDATES = 1 << 20
"""Pairs of query and item that are put in order at once: some 250 bytes each."""
_SPARE = 8
"""Candidates beyond those that are wanted: the exact order may bring some of them in."""
_IVF_POINTS_PER_LIST = 64


class Index(Protocol):
    """Searches unit vectors."""

    def search(self, queries_BD: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """Similarities and item numbers (B, k), best first; -1 where fewer were found."""


@dataclass(frozen=True)
class ExactSearch:
    """Compares with every item."""

    items_ND: Tensor
    """Unit vectors, on the device that does the work."""

    def search(self, queries_BD: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """See `Index`."""
        k = min(k, len(self.items_ND))
        rows = _QUERIES_PER_BLOCK.get(self.items_ND.device.type, 256)
        rows = max(1, min(rows, _MAX_SCORES // len(self.items_ND)))
        found = [
            _top(torch.from_numpy(queries_BD[i : i + rows]).to(self.items_ND) @ self.items_ND.T, k)
            for i in range(0, len(queries_BD), rows)
        ]
        scores, ids = (torch.cat(part).cpu().numpy() for part in zip(*found, strict=True))
        return scores, ids


@dataclass(frozen=True)
class FaissSearch:
    """An approximate index of faiss, on the CPU."""

    index: Any

    def search(self, queries_BD: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        """See `Index`."""
        scores, ids = self.index.search(queries_BD, min(k, self.index.ntotal))
        return scores, ids


def build_index(unit_ND: Float32Array, config: VqIndex, device: torch.device) -> Index:
    """An index over vectors, which the caller has scaled to length 1 and no one copies here.

    Args:
        unit_ND: contiguous, and left as they are while the index is used.
        config: of the index.
        device: of an exact one.
    """
    match config:
        case IndexBySize(exact_up_to_items=limit) if len(unit_ND) <= limit:
            return ExactSearch(torch.from_numpy(unit_ND).to(device))
        case IndexBySize(num_probes=num_probes):
            return _ivf(unit_ND, IvfIndex(num_probes=num_probes))
        case ExactIndex():
            return ExactSearch(torch.from_numpy(unit_ND).to(device))
        case IvfIndex():
            return _ivf(unit_ND, config)
        case HnswIndex():
            hnsw = faiss.IndexHNSWFlat(
                unit_ND.shape[1], config.num_links, faiss.METRIC_INNER_PRODUCT
            )
            hnsw.hnsw.efConstruction = config.ef_construction
            hnsw.hnsw.efSearch = config.ef_search
            hnsw.add(unit_ND)
            return FaissSearch(hnsw)


def save_index(index: Index, file: Path) -> Path | None:
    """Write an approximate index; None for an exact one, which is its vectors."""
    if not isinstance(index, FaissSearch):
        return None
    faiss.write_index(getattr(index.index, "ivf", index.index), str(file))
    return file


def read_index(file: Path) -> Index:
    """What `save_index` wrote."""
    return FaissSearch(faiss.read_index(str(file)))


def exact_order(index: Index, items_ND: Float32Array, vectors_BD: FloatArray, k: int) -> Int64Array:
    """Item numbers (B, k) of the largest products, the largest first, equal ones by item number.

    The index proposes, fp64 products decide (`multimodal.codes.exact_lookup`). Of an exact index
    the result depends on the vector and the items alone; an approximate one proposes what it finds.

    Args:
        index: over the items.
        items_ND: their vectors, of length 1 up to rounding.
        vectors_BD: any vectors.
        k: how many; rows that found fewer end with -1.
    """
    k = min(k, len(items_ND))
    found_Bk = np.full((len(vectors_BD), k), -1)
    found_Bk[:] = np.arange(k)  # what vectors of length 0 have: all items are equal for them
    queries_BD = unit_rows(vectors_BD)
    left, width = np.flatnonzero(queries_BD.any(axis=1)), k + _SPARE
    while len(left):
        width = min(width, len(items_ND))
        size = max(1, _MAX_CANDIDATES // width)
        unsure = []
        for rows in np.split(left, range(size, len(left), size)):
            found_Bk[rows], is_unsure = _best(
                index, items_ND, vectors_BD[rows], queries_BD[rows], width, k
            )
            unsure.append(rows[is_unsure])
        if width == len(items_ND) or not isinstance(index, ExactSearch):
            break
        left, width = np.concatenate(unsure), 4 * width
    return found_Bk


def _best(
    index: Index,
    items_ND: Float32Array,
    vectors_BD: FloatArray,
    queries_BD: Float32Array,
    width: int,
    k: int,
) -> tuple[Int64Array, BoolArray]:
    """The best k (B, k) of `width` candidates, and whether others may be better (B,)."""
    scores_Bm, ids_Bm = index.search(queries_BD, width)
    sorted_Bm = -np.sort(-scores_Bm, axis=1)
    # Two scores are off by so much at most: what is further below the k-th one is worse for sure,
    # and all that were not proposed are no better than the last one.
    least_B1 = sorted_Bm[:, [k - 1]] - 2 * rounding(items_ND.shape[1])
    proposed_Bm = np.where(scores_Bm >= least_B1, ids_Bm, -1)
    is_unsure_B = sorted_Bm[:, -1] >= least_B1[:, 0]
    return _by_product(vectors_BD, items_ND, proposed_Bm)[:, :k], is_unsure_B


def _by_product(vectors_BD: FloatArray, items_ND: Float32Array, ids_Bm: Int64Array) -> Int64Array:
    row_P, at_P = np.nonzero(ids_Bm >= 0)
    id_P = ids_Bm[row_P, at_P]
    products_Bm = np.full(ids_Bm.shape, -np.inf)
    products_Bm[row_P, at_P] = exact_products(
        torch.from_numpy(np.ascontiguousarray(vectors_BD, np.float32)),
        torch.from_numpy(row_P),
        torch.from_numpy(items_ND),
        torch.from_numpy(id_P),
    ).numpy()
    order = np.lexsort((ids_Bm, -products_Bm), axis=1)
    return np.take_along_axis(ids_Bm, order, 1)


def _ivf(unit_ND: Float32Array, config: IvfIndex) -> FaissSearch:
    num_items, dim = unit_ND.shape
    lists = min(config.num_lists or round(4 * sqrt(num_items)), max(1, num_items // 39))
    coarse = faiss.IndexFlatIP(dim)
    ivf = faiss.IndexIVFFlat(coarse, dim, lists, faiss.METRIC_INNER_PRODUCT)
    ivf.cp.spherical = True
    ivf.cp.max_points_per_centroid = _IVF_POINTS_PER_LIST
    ivf.train(unit_ND)
    ivf.add(unit_ND)
    ivf.nprobe = min(config.num_probes, lists)
    ivf.own_fields = False
    return FaissSearch(_KeepsCoarse(ivf, coarse))


class _KeepsCoarse:
    """An inverted-list index together with the coarse index it points to."""

    def __init__(self, ivf: Any, coarse: Any) -> None:
        self.ivf, self._coarse = ivf, coarse
        self.ntotal = ivf.ntotal

    def search(self, queries_BD: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        scores, ids = self.ivf.search(queries_BD, k)
        return scores, ids


def _top(scores_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row.

    They lie in the k groups with the best maxima, so only those are sorted: on a CPU about three
    times as fast as one `topk` over all items.
    """
    num_items = scores_BN.shape[1]
    if num_items <= k * _GROUP:
        best = scores_BN.topk(k, 1)
        return best.values, best.indices
    padded = nn.functional.pad(scores_BN, (0, -num_items % _GROUP), value=float("-inf"))
    grouped_BNG = padded.view(len(scores_BN), -1, _GROUP)
    groups_Bk = grouped_BNG.amax(2).topk(k, 1).indices
    candidates = grouped_BNG.gather(1, groups_Bk[:, :, None].expand(-1, -1, _GROUP)).flatten(1)
    best = candidates.topk(k, 1)
    ids_Bk = groups_Bk.gather(1, best.indices // _GROUP) * _GROUP + best.indices % _GROUP
    return best.values, ids_Bk
