"""Draws batches of item pairs, reproducibly, equally often from every kind of pairs."""

# Shapes: N items, P pairs of a kind, C pairs of a batch.

from collections.abc import Sequence

import torch
from torch import Tensor

from embedding.errors import UserError


class PairSampler:
    """Batches of pairs; equal on every rank, so each takes its share of one.

    Args:
        kinds: item rows (trigger, target) of every kind of pairs.
        num_items: N.
        seed: of the draws.

    Raises:
        UserError: there is no pair.
    """

    def __init__(self, kinds: Sequence[tuple[Tensor, Tensor]], num_items: int, seed: int) -> None:
        if not kinds:
            raise UserError(
                "no pair of items has content on both sides, so nothing can be aligned; check the "
                "columns that codes.vectors.content reads, or set codes.vectors.kind=towers"
            )
        self.kinds = kinds
        self.seed = seed
        share_2N = torch.zeros(2, num_items, dtype=torch.float64)
        for sides in kinds:
            for share_N, item_P in zip(share_2N, sides, strict=True):
                share_N += torch.bincount(item_P, minlength=num_items) / len(item_P) / len(kinds)
        self.log_share_2N = torch.where(share_2N > 0, share_2N.log(), 0.0).float()
        """log of the probability that a drawn pair's trigger, its target, is this item; 0 for items
        of no pair, which no batch holds."""

    def batch(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        """The pairs of one step, (C,) triggers and targets."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        triggers, targets = [], []
        for i, (trigger_P, target_P) in enumerate(self.kinds):
            count = size // len(self.kinds) + (i < size % len(self.kinds))
            at = torch.randint(len(trigger_P), (count,), generator=generator)
            triggers.append(trigger_P[at])
            targets.append(target_P[at])
        order = torch.randperm(size, generator=generator)
        return torch.cat(triggers)[order], torch.cat(targets)[order]
