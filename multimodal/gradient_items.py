"""Which items of a step are encoded with gradient; all others are read from the bank."""

# Shapes: U distinct items of a rank's batch.

import torch
from torch import Tensor

from embedding.items import ItemRows
from multimodal.content_config import Gradient


def own_rows(items: ItemRows, policy: Gradient, generator: torch.Generator) -> Tensor:
    """Store rows, ascending, that this rank's batch wants encoded with gradient.

    Where that is more than the bound, items of histories get `policy.history_share` of it and what
    candidates leave; candidates get the rest. Among the items of either kind all are equally likely
    to be left out.

    Args:
        items: of the batch.
        policy: says which, and how many at most.
        generator: draws, on the CPU; equal states choose equal rows.
    """
    is_candidate_U = torch.zeros(len(items.rows_U), dtype=torch.bool, device=items.rows_U.device)
    is_candidate_U[items.candidate_B] = True
    known_U, is_candidate_U = items.rows_U[1:], is_candidate_U[1:]
    candidates, others = known_U[is_candidate_U], known_U[~is_candidate_U]
    match policy.items:
        case "targets":
            others = others[:0]
        case "targets+sample":
            others = _draw(others, round(policy.sample_share * len(others)), generator)
        case "all":
            pass
    bound = policy.max_items_per_step
    if bound is not None:
        kept_free = min(len(others), round(policy.history_share * bound), bound - 1)
        candidates = _draw(candidates, bound - kept_free, generator)
        others = _draw(others, bound - len(candidates), generator)
    return torch.cat([candidates, others]).sort().values


def _draw(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` of the rows, each set equally likely."""
    if count >= len(rows):
        return rows
    chosen = torch.randperm(len(rows), generator=generator)[:count]
    return rows[chosen.to(rows.device)]
