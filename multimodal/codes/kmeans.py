"""K-means in torch: nearest codewords by blocked matrix products, Lloyd, repair of empty clusters.

The same code runs on a CPU and on a GPU.
"""

# Shapes: N vectors, B vectors of a block, D vector dim, K codewords.

from collections.abc import Iterator

import torch
from torch import Tensor

# 2048 x 1024 scores are 8 MiB: they stay in cache between the product and the argmax.
_ROWS_PER_BLOCK = {"cpu": 2048, "cuda": 1 << 17}
_MAX_SCORES = 1 << 27
"""In memory at once, however large a codebook is."""
_REPAIR_ROUNDS = 64
_COARSE_POINTS = 64
"""Vectors per codeword of the coarse resolutions."""


def nearest_codewords(x_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Index (N,) of the codeword with the smallest Euclidean distance; the first one of equals."""
    codes_N = torch.empty(len(x_ND), dtype=torch.int64, device=x_ND.device)
    for start, scores_BK in codeword_scores(x_ND, codebook_KD):
        torch.argmax(scores_BK, 1, out=codes_N[start : start + len(scores_BK)])
    return codes_N


def codeword_scores(x_ND: Tensor, codebook_KD: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row of a block, and its scores (B, K): the largest is that of the nearest codeword.

    |x|^2 is the same for all codewords, so the score is x.c - |c|^2 / 2. The next block overwrites
    the scores.
    """
    minus_half_norms_K = codebook_KD.square().sum(1).div_(-2)
    codebook_DK = codebook_KD.t().contiguous()
    rows = _ROWS_PER_BLOCK.get(x_ND.device.type, 1 << 14)
    rows = max(1, min(rows, _MAX_SCORES // max(1, len(codebook_KD))))
    scores = x_ND.new_empty(min(rows, len(x_ND)), len(codebook_KD))
    for start in range(0, len(x_ND), rows):
        x_BD = x_ND[start : start + rows]
        yield start, torch.addmm(minus_half_norms_K, x_BD, codebook_DK, out=scores[: len(x_BD)])


def cluster_sums(x_ND: Tensor, codes_N: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Sum (K, D) and number (K,) of the vectors of each cluster."""
    sums_KD = x_ND.new_zeros(num_clusters, x_ND.shape[1]).index_add_(0, codes_N, x_ND)
    return sums_KD, torch.bincount(codes_N, minlength=num_clusters)


def cluster_means(x_ND: Tensor, codes_N: Tensor, codebook_KD: Tensor) -> Tensor:
    """Mean of the vectors of each cluster; an empty one keeps its codeword."""
    sums_KD, sizes_K = cluster_sums(x_ND, codes_N, len(codebook_KD))
    means_KD = sums_KD / sizes_K.clamp(min=1)[:, None]
    return torch.where(sizes_K[:, None] > 0, means_KD, codebook_KD)


def lloyd(x_ND: Tensor, start_KD: Tensor, iterations: int) -> Tensor:
    """Codebook after some iterations; empty clusters are moved to where the error is largest."""
    codebook_KD = start_KD.clone()
    for _ in range(iterations):
        codes_N = nearest_codewords(x_ND, codebook_KD)
        move_empty_codewords(x_ND, codebook_KD, codes_N)
        codebook_KD = cluster_means(x_ND, codes_N, codebook_KD)
    return codebook_KD


def move_empty_codewords(
    x_ND: Tensor, codebook_KD: Tensor, codes_N: Tensor, kept_K: Tensor | None = None
) -> int:
    """Put empty codewords onto the worst vectors of the clusters with the largest errors.

    One vector a cluster, so the new codewords are distinct. `codebook_KD` and the codes of the
    vectors that got a codeword of their own are changed in place. `kept_K` names codewords that
    stay where they are, empty or not.

    Returns:
        How many codewords were empty.
    """
    sizes_K = torch.bincount(codes_N, minlength=len(codebook_KD))
    is_empty_K = sizes_K == 0
    if kept_K is not None:
        is_empty_K &= ~kept_K
    empty = is_empty_K.nonzero()[:, 0]
    if not len(empty):
        return 0
    errors_N = (x_ND - codebook_KD[codes_N]).square().sum(1)
    errors_K = errors_N.new_zeros(len(codebook_KD)).index_add_(0, codes_N, errors_N)
    # By cluster, then by error: the last vector of a cluster's run is its worst.
    by_error = errors_N.argsort(stable=True)
    order = by_error[codes_N[by_error].argsort(stable=True)]
    worst_K = order[sizes_K.cumsum(0).sub(1).clamp(min=0)]
    donors = errors_K.argsort(descending=True, stable=True)[: len(empty)]
    # A lone vector or a cluster of equal ones has nothing to give.
    donors = donors[(sizes_K[donors] > 1) & (errors_N[worst_K[donors]] > 0)]
    moved, rows = empty[: len(donors)], worst_K[donors]
    codebook_KD[moved] = x_ND[rows]
    codes_N[rows] = moved
    return len(empty)


def repair(
    x_ND: Tensor, codebook_KD: Tensor, kept_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Move empty codewords until each is the nearest of some vector, as far as vectors differ.

    Args:
        x_ND: the vectors.
        codebook_KD: codewords.
        kept_K: codewords that count as in use though none of these vectors has them; None: none.

    Returns:
        The codebook (K, D) and the codes (N,).
    """
    codebook_KD = codebook_KD.clone()
    codes_N = nearest_codewords(x_ND, codebook_KD)
    fewest = len(codebook_KD)
    for _ in range(_REPAIR_ROUNDS):
        empty = move_empty_codewords(x_ND, codebook_KD, codes_N, kept_K)
        if empty == 0:
            break
        codes_N = nearest_codewords(x_ND, codebook_KD)
        in_use_K = torch.bincount(codes_N, minlength=len(codebook_KD)) > 0
        if kept_K is not None:
            in_use_K |= kept_K
        left = int((~in_use_K).sum())
        if left >= fewest:
            break
        fewest = left
    return codebook_KD, codes_N


def progressive_start(x_ND: Tensor, num_codewords: int, iterations: int, seed: int) -> Tensor:
    """A codebook grown from few principal directions to all: a better optimum than from scratch.

    K-means finds the coarse structure in the leading 1/16 of the directions, and every doubling
    starts from what the one before found. A part of the vectors is enough for these starts.
    """
    dim = x_ND.shape[1]
    directions_DD = principal_directions(x_ND)
    generator = torch.Generator().manual_seed(seed)
    order_N = torch.randperm(len(x_ND), generator=generator).to(x_ND.device)
    rotated_ND = x_ND[order_N[: _COARSE_POINTS * num_codewords]] @ directions_DD
    codebook_KD = rotated_ND[:num_codewords].clone()
    for part in (16, 8, 4, 2):
        width = dim // part
        if width:
            leading = rotated_ND[:, :width].contiguous()
            start = codebook_KD[:, :width].contiguous()
            codebook_KD[:, :width] = lloyd(leading, start, iterations)
            codebook_KD[:, width:] = 0
    return codebook_KD @ directions_DD.T


def principal_directions(x_ND: Tensor) -> Tensor:
    """Orthonormal directions, the columns of (D, D), by descending variance.

    The sign of each makes its largest component positive: eigenvectors come with any sign.
    """
    centred = x_ND - x_ND.mean(0)
    covariance = (centred.T @ centred).double() / max(1, len(x_ND) - 1)
    directions_DD = torch.linalg.eigh(covariance.cpu()).eigenvectors.flip(1)
    largest = directions_DD.abs().argmax(0)
    signs = directions_DD[largest, torch.arange(len(largest))].sign()
    return (directions_DD * signs).to(x_ND)
