"""Keeps yesterday's meaning through a refit: which new code is which old one, row by row.

A refit numbers its codewords anew. `align` gives every new codeword the number of the old one it is
matched to (optimal assignment by distance, level by level), and `Carry` tells a warm start which
old row each row of the code table begins with.

Levels are matched one by one, without looking at the levels before: the residual that level l
encodes is x minus the *vector* of the chosen codeword, which a renumbering of level l - 1 does not
change, so a permutation on one level leaves the codewords of all others in place. What moves the
codewords of level l is how far those of level l - 1 moved, and then the distance says so.
"""

# Shapes: K codes of a level (row 0 of a table is the OOV row, so tables have K + 1 rows),
# D vector dim, P FSQ directions.

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from multimodal.codes.config import Vq
from multimodal.codes.fsq import FsqLevel
from multimodal.codes.kmeans import nearest_codewords
from multimodal.codes.residual_quantizer import CPU, ResidualCodebooks
from multimodal.codes.vector_quantizer import FREE, ItemCodebook
from multimodal.codes.vectors import BoolArray, Int64Array


@dataclass(frozen=True)
class Carry:
    """What each row of a code table starts with after a refit; plain arrays over new codes."""

    num_before: int
    """Codes of the old level; 0 where there was none to compare with."""
    source_K: Int64Array
    """Old code whose row is taken; -1: none, the row keeps its start value."""
    carried_K: BoolArray
    """The old code means the same, so optimizer state is taken along. Where it is False, `source_K`
    is the nearest old code and the optimizer starts anew."""

    @property
    def share_carried(self) -> float:
        """Share of new codes that go on with their meaning."""
        return float(self.carried_K.mean())

    def after(self, earlier: "Carry") -> "Carry":
        """This refit following an earlier one: from the codes before both to those after both."""
        known_K = self.source_K >= 0
        source_K = np.where(known_K, earlier.source_K[self.source_K], -1)
        carried_K = self.carried_K & known_K & earlier.carried_K[self.source_K]
        return Carry(earlier.num_before, source_K, carried_K)

    def inverse(self, num_codes: int) -> "Carry":
        """This refit taken back: from the codes after it to those before.

        An old code that went on has its row back. One that did not starts from the row of a new
        code that had started from its own, where there is one.

        Args:
            num_codes: codes before the refit.
        """
        if not self.num_before:
            return fresh(0, num_codes)
        source = np.full(num_codes, -1, np.int64)
        carried = np.zeros(num_codes, np.bool_)
        for new in (np.flatnonzero(~self.carried_K & (self.source_K >= 0)), self._carried):
            source[self.source_K[new]] = new
        carried[self.source_K[self._carried]] = True
        return Carry(len(self.source_K), source, carried)

    @property
    def _carried(self) -> Int64Array:
        """New codes that go on."""
        return np.flatnonzero(self.carried_K)


def match_codewords(before_KD: Tensor, after_KD: Tensor) -> tuple[Int64Array, Int64Array]:
    """Pairs (old, new) that minimise the summed distance; as many as the smaller side has.

    Returns:
        Old codes in ascending order, and the new code matched to each.
    """
    distances = torch.cdist(before_KD.double(), after_KD.double()).numpy()
    old, new = linear_sum_assignment(distances)
    return old, new


def align(
    before: ResidualCodebooks, after: ResidualCodebooks
) -> tuple[ResidualCodebooks, list[Carry]]:
    """Renumber the codewords of `after` like those of `before`.

    A larger codebook appends its unmatched codewords; in a smaller one the matched codewords keep
    the order of the old numbers.

    Returns:
        The renumbered codebooks, and one `Carry` a level. Levels that `before` has not start fresh.
    """
    if before.dim != after.dim:
        return after, [fresh(0, size) for size in after.level_sizes]
    codebooks_LKD = after.codebooks_LKD.clone()
    carries = []
    for level in range(len(codebooks_LKD)):
        if level >= len(before.codebooks_LKD):
            carries.append(fresh(0, codebooks_LKD.shape[1]))
            continue
        old, new = match_codewords(before.codebooks_LKD[level], after.codebooks_LKD[level])
        rest = np.setdiff1d(np.arange(codebooks_LKD.shape[1]), new)
        order = torch.from_numpy(np.concatenate([new, rest]))
        codebooks_LKD[level] = after.codebooks_LKD[level][order]
        matched_K = np.concatenate([old, np.full(len(rest), -1)])
        nearest_K = nearest_codewords(codebooks_LKD[level], before.codebooks_LKD[level])
        carries.append(_carry(before.level_sizes[level], nearest_K, matched_K))
    aligned = ResidualCodebooks(codebooks_LKD, after.fsq)
    if after.fsq and before.fsq:
        matched_K = np.full(after.fsq.num_codes, -1)
        if after.fsq.values_PV.shape == before.fsq.values_PV.shape:
            aligned = ResidualCodebooks(codebooks_LKD, _align_fsq(before.fsq, after.fsq))
            matched_K = np.arange(after.fsq.num_codes)
        assert aligned.fsq
        words_KD = aligned.fsq.decode(torch.arange(aligned.fsq.num_codes))
        nearest_K = before.fsq.nearest(words_KD)
        carries.append(_carry(before.fsq.num_codes, nearest_K, matched_K))
    elif after.fsq:
        carries.append(fresh(0, after.fsq.num_codes))
    return aligned, carries


def carry_items(
    before: ItemCodebook, after: ItemCodebook, look_up: Vq, device: torch.device = CPU
) -> Carry:
    """Rows of the VQ table: an item's row stays its own; a new item's starts from the nearest.

    Args:
        before: the codebook whose rows are carried.
        after: the codebook that gets them.
        look_up: how the nearest are found.
        device: of an exact search.
    """
    now, then = after.item_ids_N, before.item_ids_N
    source = np.full(len(now), -1, np.int64)
    shared = min(len(now), len(then))
    carried = np.zeros(len(now), np.bool_)
    carried[:shared] = (now[:shared] == then[:shared]) & (now[:shared] != FREE)
    source[carried] = np.flatnonzero(carried)
    new = np.flatnonzero(~carried & (now != FREE))
    is_alike = before.vectors_ND.shape[1] == after.vectors_ND.shape[1]
    if len(new) and (then != FREE).any() and is_alike:
        nearest = before.neighbours(look_up.model_copy(update={"top_k": 1}), device)
        source[new] = nearest.encode(after.vectors_ND[new])[:, 0]
    return Carry(len(then), source, carried)


def fresh(num_before: int, num_codes: int) -> Carry:
    """No row is taken over."""
    return Carry(num_before, np.full(num_codes, -1, np.int64), np.zeros(num_codes, np.bool_))


def _carry(num_before: int, nearest_K: Tensor, matched_K: Int64Array) -> Carry:
    """Carried where the nearest old codeword is the matched one.

    Where it is another one, that one's row describes the new codeword better than the row that the
    assignment had left for it.
    """
    source_K = nearest_K.numpy()
    return Carry(num_before, source_K, source_K == matched_K)


def _align_fsq(before: FsqLevel, after: FsqLevel) -> FsqLevel:
    """Order and sign of the new directions like those of the most similar old ones."""
    old_DP = before.weights_DP / before.weights_DP.norm(dim=0)
    new_DP = after.weights_DP / after.weights_DP.norm(dim=0)
    cosine_PP = old_DP.T @ new_DP
    _, order = linear_sum_assignment(-cosine_PP.abs().double().numpy())
    order_P = torch.from_numpy(order)
    signs_P = cosine_PP[torch.arange(len(order_P)), order_P]
    return after.reordered(order_P, signs_P < 0)
