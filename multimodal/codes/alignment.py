"""Contrastive training of an item encoder on pairs of items that behaviour holds for alike (QARM).

Large batches need the vectors of all their items at once, and the activations of none: every step
encodes its items without a graph, takes the gradient of the loss for each vector, and then encodes
piece by piece again to send that gradient through (GradCache, arXiv 2101.06983). The result is the
gradient of the plain step, on any number of ranks.

Shapes: B pairs of this rank, C pairs of all ranks, U distinct items of this rank, D vector dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from multimodal.token_batch import TokenBatch

_MASKED = -torch.inf


@dataclass(frozen=True)
class PairItems:
    """Items of all pairs of a step, and how often pairs hold each of them."""

    trigger_C: Tensor
    target_C: Tensor
    trigger_log_share_C: Tensor
    """log of the share of the training pairs' triggers that this item makes up."""
    target_log_share_C: Tensor
    """The same of their targets."""


def alignment_loss(
    trigger_CD: Tensor, target_CD: Tensor, items: PairItems, temperature: Tensor, rows: slice
) -> Tensor:
    """Contrastive loss of some pairs against all others, both directions, summed / C.

    A column that holds an item of the row's own pair is no negative: other pairs of the same item
    are left out. With log shares, a frequent negative weighs as much as a rare one (the logQ
    correction of Yi et al., RecSys 2019); without (zeros) frequent items are pushed away because
    they are drawn more often.

    Args:
        trigger_CD: unit vectors of the pairs' first items.
        target_CD: of their second items.
        items: which items these are.
        temperature: scalar.
        rows: of the pairs whose loss is returned.
    """
    forward = _one_direction(
        trigger_CD[rows] @ target_CD.T / temperature - items.target_log_share_C,
        (items.trigger_C[rows], items.target_C[rows]),
        items.target_C,
        rows.start,
    )
    backward = _one_direction(
        target_CD[rows] @ trigger_CD.T / temperature - items.trigger_log_share_C,
        (items.target_C[rows], items.trigger_C[rows]),
        items.trigger_C,
        rows.start,
    )
    return (forward + backward) / (2 * len(trigger_CD))


def _one_direction(
    logits_BC: Tensor, own: tuple[Tensor, Tensor], column_C: Tensor, first_row: int
) -> Tensor:
    own_B = torch.arange(len(logits_BC), device=logits_BC.device) + first_row
    same_BC = (own[0][:, None] == column_C) | (own[1][:, None] == column_C)
    same_BC[torch.arange(len(own_B), device=own_B.device), own_B] = False
    masked_BC = logits_BC.masked_fill(same_BC, _MASKED)
    return nn.functional.cross_entropy(masked_BC, own_B, reduction="sum")


class AlignmentStep:
    """Gradients of one batch of pairs in the encoder, equal to those of one large plain step.

    Args:
        encoder: tokens to vectors.
        read: tokens of items by row.
        log_share_2N: of triggers and targets, see `PairItems`, by item row; zeros switch the
            correction off.
        log_temperature: a parameter, or a constant that needs no gradient.
        items_per_chunk: items whose activations are held, and dropout drawn, at a time; None: all.
    """

    def __init__(
        self,
        encoder: nn.Module,
        read: Callable[[Tensor], TokenBatch],
        *,
        log_share_2N: Tensor,
        log_temperature: Tensor,
        items_per_chunk: int | None,
    ) -> None:
        self.encoder = encoder
        self.read = read
        self.log_share_2N = log_share_2N
        self.log_temperature = log_temperature
        self.items_per_chunk = items_per_chunk

    def backward(self, trigger_B: Tensor, target_B: Tensor, seed: Sequence[int]) -> float:
        """Add this step's gradients; every rank gives equally many pairs.

        Args:
            trigger_B: item rows, on the CPU.
            target_B: item rows, on the CPU.
            seed: of dropout, equal for both passes over an item; not that of another rank.

        Returns:
            The loss over all ranks.
        """
        rows_U, inverse = torch.unique(torch.cat([trigger_B, target_B]), return_inverse=True)
        chunks = list(rows_U.split(self.items_per_chunk or max(1, len(rows_U))))
        with torch.no_grad():
            vectors_UD = torch.cat([self._encode(c, [*seed, i]) for i, c in enumerate(chunks)])
        vectors_UD.requires_grad_()
        unit_UD = nn.functional.normalize(vectors_UD, dim=1)
        pairs = unit_UD[inverse].unflatten(0, (2, len(trigger_B)))
        loss, gradient = self._loss(pairs.detach(), trigger_B, target_B)
        pairs.backward(gradient)
        assert vectors_UD.grad is not None
        for i, (chunk, grad_UD) in enumerate(
            zip(chunks, vectors_UD.grad.split([len(c) for c in chunks]), strict=True)
        ):
            self._encode(chunk, [*seed, i]).backward(grad_UD)
        self._reduce_gradients()
        return float(loss)

    def _encode(self, rows: Tensor, seed: Sequence[int]) -> Tensor:
        device = self.log_share_2N.device
        mixed = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(mixed[0]) >> 1)
            vectors_UD: Tensor = self.encoder(self.read(rows).to(device))
        return vectors_UD

    def _loss(
        self, pairs_2BD: Tensor, trigger_B: Tensor, target_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The global loss, and its gradient for this rank's vectors."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if _is_group() else (0, 1)
        size = len(trigger_B)
        all_2CD = _gather(pairs_2BD, dim=1).requires_grad_()
        items_2B = torch.stack([trigger_B, target_B]).to(pairs_2BD.device)
        trigger_C, target_C = _gather(items_2B, dim=1)
        of_trigger_N, of_target_N = self.log_share_2N
        items = PairItems(trigger_C, target_C, of_trigger_N[trigger_C], of_target_N[target_C])
        mine = slice(rank * size, (rank + 1) * size)
        loss = alignment_loss(all_2CD[0], all_2CD[1], items, self.log_temperature.exp(), mine)
        loss.backward()  # the vectors are leaves: it ends there and in the temperature
        assert all_2CD.grad is not None
        total = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(all_2CD.grad)
            dist.all_reduce(total)
        return total, all_2CD.grad[:, mine]

    def _reduce_gradients(self) -> None:
        if not _is_group():
            return
        trained = [*self.encoder.parameters(), self.log_temperature]
        trained = [parameter for parameter in trained if parameter.requires_grad]
        if not trained:
            return
        for parameter in trained:  # ranks whose items do not touch it take part, too
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in trained if p.grad is not None]
        flat_P = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat_P)
        for gradient, part in zip(
            gradients, flat_P.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))


def _is_group() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _gather(x: Tensor, dim: int) -> Tensor:
    """The tensors of all ranks, side by side."""
    if not _is_group():
        return x.clone()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=dim)
