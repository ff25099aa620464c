"""What codes are worth: collisions, use of codewords, error, self-retrieval, stability."""

# Shapes: N items, B queries, L levels, D vector dim.

import numpy as np
import torch

from multimodal.codes.figures import CodeMetrics, LevelMetrics, Stability
from multimodal.codes.residual_quantizer import CPU, ResidualCodebooks
from multimodal.codes.tree import code_groups
from multimodal.codes.vectors import (
    FloatArray,
    Int32Array,
    Int64Array,
    blocks,
    sample_rows,
    unit_rows,
)

_MAX_COMPARED = 4_000_000_000
"""Pairs of a query and an item."""
_LEAST_QUERIES = 100


def measure_codes(
    vectors_ND: FloatArray,
    codes_NL: Int32Array,
    books: ResidualCodebooks,
    *,
    max_queries: int = 2000,
    device: torch.device = CPU,
) -> CodeMetrics:
    """All figures; self-retrieval on at most `max_queries` items drawn reproducibly.

    Of very large sets on fewer of them: each is compared with all items.
    """
    errors = books.errors_of_codes(vectors_ND, codes_NL, device)
    max_queries = min(max_queries, max(_LEAST_QUERIES, _MAX_COMPARED // max(1, len(vectors_ND))))
    levels = []
    for level, num_codes in enumerate(books.level_sizes):
        counts = np.bincount(codes_NL[:, level], minlength=num_codes)
        levels.append(
            LevelMetrics(
                num_codes=num_codes,
                utilisation=float((counts > 0).mean()),
                perplexity=perplexity(counts),
                mse=float(errors[level + 1]),
            )
        )
    sizes = code_groups(codes_NL)[1]
    queries = sample_rows(len(vectors_ND), max_queries, seed=0)
    ranks = retrieval_ranks(vectors_ND, books.decode(codes_NL[queries]), queries, device)
    return CodeMetrics(
        num_items=len(vectors_ND),
        collision_rate=collision_rate(codes_NL),
        largest_collision=int(sizes.max(initial=0)),
        mean_squared_length=float(errors[0]),
        levels=tuple(levels),
        hit_rate_1=float((ranks < 1).mean()),
        hit_rate_10=float((ranks < 10).mean()),
    )


def collision_rate(codes_NL: Int32Array) -> float:
    """Share of items whose full code is not unique; 0 for no items."""
    group_N, sizes = code_groups(codes_NL)
    return float((sizes[group_N] > 1).mean()) if len(group_N) else 0.0


def perplexity(counts: Int64Array) -> float:
    """exp(entropy) of how often each code is used."""
    share = counts[counts > 0] / max(1, counts.sum())
    return float(np.exp(-(share * np.log(share)).sum()))


def retrieval_ranks(
    vectors_ND: FloatArray,
    rebuilt_BD: FloatArray,
    own_B: Int64Array,
    device: torch.device = CPU,
) -> Int64Array:
    """How many items are more similar (cosine) to each reconstruction than its own item (B,)."""
    rebuilt = torch.from_numpy(unit_rows(rebuilt_BD)).to(device)
    own = torch.from_numpy(unit_rows(vectors_ND[own_B])).to(device)
    # Up to rounding, so that an item does not come behind itself.
    own_B1 = (rebuilt * own).sum(1, keepdim=True) + 1e-6
    ranks_B = torch.zeros(len(own_B), dtype=torch.int64, device=device)
    for _, block_ND in blocks(vectors_ND, rows=1 << 14):
        scores_BN = rebuilt @ torch.from_numpy(unit_rows(block_ND)).to(device).T
        ranks_B += (scores_BN > own_B1).sum(1)
    return ranks_B.cpu().numpy()


def stability(before_NL: Int32Array, after_NL: Int32Array) -> Stability:
    """Compare two sets of codes of the same items; code numbers must be aligned already."""
    same_NL = before_NL == after_NL
    prefixes = np.logical_and.accumulate(same_NL, axis=1).mean(axis=0)
    return Stability(
        num_items=len(same_NL),
        full=float(prefixes[-1]),
        prefixes=tuple(float(share) for share in prefixes),
        levels=tuple(float(share) for share in same_NL.mean(axis=0)),
    )
