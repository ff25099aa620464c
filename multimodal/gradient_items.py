"""Which items of a step are encoded with gradient; all others are read from the bank."""

# Shapes: U distinct items of a rank's batch.

import torch
from torch import Tensor

from embedding.items import ItemRows
from multimodal.content_config import Gradient


def own_rows(items: ItemRows, policy: Gradient, generator: torch.Generator) -> Tensor:
    """Store rows, ascending, that this rank's batch wants encoded with gradient.

    Candidates come first; where they alone are more than the bound, a random part of them.

    Args:
        items: of the batch.
        policy: says which, and how many at most.
        generator: draws the sample, on the CPU.
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
    if policy.max_items_per_step is not None:
        candidates = _draw(candidates, policy.max_items_per_step, generator)
        others = _draw(others, policy.max_items_per_step - len(candidates), generator)
    return torch.cat([candidates, others]).sort().values


def _draw(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` of the rows, each set equally likely."""
    if count >= len(rows):
        return rows
    chosen = torch.randperm(len(rows), generator=generator)[:count]
    return rows[chosen.to(rows.device)]
