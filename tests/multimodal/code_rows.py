"""Rows of a whole code table after a refit: what sharded loading is compared with."""

import numpy as np
import torch

from multimodal.codes.match import Carry


def table_rows(carry: Carry, before: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The new table; row 0 is the OOV row, row c + 1 belongs to code c."""
    return _moved(carry, carry.source_K >= 0, before, start)


def optimizer_rows(carry: Carry, before: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Optimizer state by row."""
    return _moved(carry, carry.carried_K, before, start)


def _moved(
    carry: Carry, is_taken_K: np.ndarray, before: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    rows = start.clone()
    if carry.num_before:
        rows[0] = before[0]
    for code in np.flatnonzero(is_taken_K).tolist():
        rows[code + 1] = before[int(carry.source_K[code]) + 1]
    return rows
