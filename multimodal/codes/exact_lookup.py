"""Look-ups that depend on the vector and the codebook alone.

A matrix product rounds in an order that depends on the shape of the block, on threads and on the
device, so a vector half-way between two codewords could get one code today and another tomorrow, or
on another worker. Here products only propose: where the best two lie closer than rounding can tell,
fp64 distances, summed dimension by dimension, decide. So codes may be kept from day to day, and
computed in any pieces, on CPUs and GPUs, and are the same.
"""

# Shapes: N vectors, B vectors of a block, D vector dim, K codewords, P pairs, M candidates.

import torch
from torch import Tensor

from multimodal.codes.kmeans import codeword_scores

_UNIT_ROUNDOFF = 2.0**-24
_MAX_ELEMENTS = 1 << 22
"""Of fp64 differences in memory at once."""


def rounding(dim: int) -> float:
    """Bound of the error of an fp32 product of two unit vectors, whatever the order of its sum.

    The classic dim * u, and room for the rounding of the norms and of the bound itself.
    """
    return 1.1 * (dim + 8) * _UNIT_ROUNDOFF


def exact_codewords(x_ND: Tensor, codebook_KD: Tensor) -> Tensor:
    """Index (N,) of the nearest codeword; the first one of equals."""
    codes_N = torch.empty(len(x_ND), dtype=torch.int64, device=x_ND.device)
    longest = codebook_KD.norm(dim=1).max()
    near: list[tuple[Tensor, Tensor]] = []
    for start, scores_BK in codeword_scores(x_ND, codebook_KD):
        best_B, code_B = scores_BK.max(1)
        codes_N[start : start + len(code_B)] = code_B
        norms_B = x_ND[start : start + len(code_B)].norm(dim=1)
        # Each of two scores x.c - |c|^2 / 2 is off by so much at most.
        least_B = best_B - 2 * rounding(x_ND.shape[1]) * longest * (norms_B + longest)
        scores_BK.scatter_(1, code_B[:, None], -torch.inf)
        unsure = (scores_BK.amax(1) >= least_B).nonzero()[:, 0]
        if len(unsure):
            scores_BK = scores_BK[unsure].scatter_(1, code_B[unsure, None], torch.inf)
            row_P, code_P = (scores_BK >= least_B[unsure, None]).nonzero(as_tuple=True)
            near.append((start + unsure[row_P], code_P))
    if near:
        row_P, code_P = (torch.cat(part) for part in zip(*near, strict=True))
        _decide(codes_N, row_P, code_P, exact_distances(x_ND, row_P, codebook_KD, code_P))
    return codes_N


def exact_distances(x_ND: Tensor, row_P: Tensor, y_KD: Tensor, other_P: Tensor) -> Tensor:
    """Squared distances (P,) of pairs, fp64, summed in the order of the dimensions."""
    parts = []
    for rows, others in _pieces(row_P, other_P, x_ND.shape[1]):
        parts.append(_in_order((x_ND[rows].double() - y_KD[others].double()).square_()))
    return torch.cat(parts) if parts else x_ND.new_empty(0, dtype=torch.float64)


def exact_products(x_ND: Tensor, row_P: Tensor, y_KD: Tensor, other_P: Tensor) -> Tensor:
    """Products x.y (P,) of pairs, fp64, summed in the order of the dimensions."""
    parts = []
    for rows, others in _pieces(row_P, other_P, x_ND.shape[1]):
        parts.append(_in_order(x_ND[rows].double().mul_(y_KD[others].double())))
    return torch.cat(parts) if parts else x_ND.new_empty(0, dtype=torch.float64)


def _decide(codes_N: Tensor, row_P: Tensor, code_P: Tensor, distance_P: Tensor) -> None:
    """Write the nearest code of every row that has pairs; of equal ones the first."""
    rows, at_P = row_P.unique(return_inverse=True)
    least = distance_P.new_full((len(rows),), torch.inf)
    least.scatter_reduce_(0, at_P, distance_P, "amin")
    is_least_P = distance_P == least[at_P]
    first = code_P.new_full((len(rows),), torch.iinfo(torch.int64).max)
    first.scatter_reduce_(0, at_P[is_least_P], code_P[is_least_P], "amin")
    codes_N[rows] = first


def _pieces(row_P: Tensor, other_P: Tensor, dim: int) -> list[tuple[Tensor, Tensor]]:
    size = max(1, _MAX_ELEMENTS // max(1, dim))
    return list(zip(row_P.split(size), other_P.split(size), strict=True)) if len(row_P) else []


def _in_order(terms_PD: Tensor) -> Tensor:
    """Sums over the dimensions, one after the other: elementwise sums are the same everywhere."""
    total_P = terms_PD.new_zeros(len(terms_PD))
    for terms_P in terms_PD.t().contiguous():
        total_P += terms_P
    return total_P
