"""Draws batches of item pairs, reproducibly, equally often from every kind of pairs."""

# Shapes: N items, P pairs of a kind, C pairs of a batch.

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from embedding.errors import UserError
from multimodal.codes.vectors import Int32Array

_PAIRS_PER_BLOCK = 1 << 22


class PairSampler:
    """Batches of pairs; equal on every rank, so each takes its share of one.

    Memory-mapped pairs stay on disk: they are counted a block at a time, and read where drawn.

    Args:
        kinds: item rows (P, 2), trigger and target, of every kind of pairs.
        num_items: N.
        seed: of the draws.

    Raises:
        UserError: there is no pair.
    """

    def __init__(self, kinds: Sequence[Int32Array], num_items: int, seed: int) -> None:
        if not kinds:
            raise UserError(
                "no pair of items has content on both sides, so nothing can be aligned; check the "
                "columns that codes.vectors.content reads, or set codes.vectors.kind=towers"
            )
        self.kinds = kinds
        self.seed = seed
        share_2N = torch.zeros(2, num_items, dtype=torch.float64)
        for pairs_P2 in kinds:
            share_2N += _counts(pairs_P2, num_items) / len(pairs_P2) / len(kinds)
        self.log_share_2N = torch.where(share_2N > 0, share_2N.log(), 0.0).float()
        """log of the probability that a drawn pair's trigger, its target, is this item; 0 for items
        of no pair, which no batch holds."""

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """The pairs of one step, (C,) triggers and targets."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        drawn = []
        for i, pairs_P2 in enumerate(self.kinds):
            count = size // len(self.kinds) + (i < size % len(self.kinds))
            at = torch.randint(len(pairs_P2), (count,), generator=generator)
            drawn.append(_rows(pairs_P2[at.numpy()]))
        order = torch.randperm(size, generator=generator)
        trigger_C, target_C = torch.cat(drawn)[order].T.contiguous()
        return trigger_C, target_C


def _counts(pairs_P2: Int32Array, num_items: int) -> Tensor:
    """Pairs (2, N) whose trigger, whose target is each item."""
    counts_2N = torch.zeros(2, num_items, dtype=torch.int64)
    for start in range(0, len(pairs_P2), _PAIRS_PER_BLOCK):
        block_P2 = _rows(pairs_P2[start : start + _PAIRS_PER_BLOCK])
        ones_P = torch.ones(len(block_P2), dtype=torch.int64)
        for counts_N, row_P in zip(counts_2N, block_P2.T, strict=True):
            counts_N.index_add_(0, row_P, ones_P)
    return counts_2N


def _rows(pairs_P2: Int32Array) -> Tensor:
    """As a tensor of their own that torch may index with."""
    return torch.from_numpy(pairs_P2.astype(np.int64))
