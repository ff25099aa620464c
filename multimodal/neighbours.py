"""The most similar of many items: exact by blocked matrix products, or approximate by faiss."""

# Shapes: N items, B queries of a block, D vector dim, G items of a group, k neighbours.

from dataclasses import dataclass
from math import sqrt
from typing import Any, Protocol

import faiss
import numpy as np
import torch
from torch import Tensor, nn

from multimodal.codes_config import ExactIndex, HnswIndex, IndexBySize, ItemIndex, IvfIndex
from multimodal.vectors import Float32Array, FloatArray, Int64Array, unit_rows

_GROUP = 128
_MAX_SCORES = 1 << 25
"""Scores in memory at once."""
_QUERIES_PER_BLOCK = 256
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
        rows = max(1, min(_QUERIES_PER_BLOCK, _MAX_SCORES // len(self.items_ND)))
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


def build_index(vectors_ND: FloatArray, config: ItemIndex, device: torch.device) -> Index:
    """An index over vectors, which are scaled to length 1."""
    unit_ND = unit_rows(vectors_ND)
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


def nearest_items(index: Index, vectors_ND: FloatArray, k: int) -> tuple[Float32Array, Int64Array]:
    """Cosine similarities and item numbers (N, k), best first, equal ones by item number.

    Rows of an approximate index that found fewer than `k` end with -1.
    """
    scores_Nk, ids_Nk = index.search(unit_rows(vectors_ND), k)
    order = np.lexsort((ids_Nk, -scores_Nk), axis=1)
    return np.take_along_axis(scores_Nk, order, 1), np.take_along_axis(ids_Nk, order, 1)


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
        self._ivf, self._coarse = ivf, coarse
        self.ntotal = ivf.ntotal

    def search(self, queries_BD: Float32Array, k: int) -> tuple[Float32Array, Int64Array]:
        scores, ids = self._ivf.search(queries_BD, k)
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
