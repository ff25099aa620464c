"""The content bank: the last known vector of every item, and when it was written."""

# Shapes: R rows of the store, U items, D content dim.

from collections.abc import Mapping

import torch
from torch import Tensor

from embedding.errors import UserError


class ContentBank:
    """One vector a store row, on the device of its rank; equal on all ranks."""

    def __init__(self, num_rows: int, dim: int, device: torch.device) -> None:
        self.vectors_RD = torch.zeros(num_rows, dim, device=device)
        self.written_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        """Step before which a vector was computed."""

    def write(self, rows_U: Tensor, vectors_UD: Tensor, step: int) -> None:
        """Replace the vectors of distinct rows by those of step `step`."""
        self.vectors_RD.index_copy_(0, rows_U, vectors_UD)
        self.written_R[rows_U] = step

    def fill(self, vectors_RD: Tensor, step: int) -> None:
        """Replace all vectors."""
        self.vectors_RD.copy_(vectors_RD)
        self.written_R.fill_(step)

    def read(self, rows_U: Tensor) -> Tensor:
        """A copy of the last known vectors, (U, D)."""
        return self.vectors_RD.index_select(0, rows_U)

    def ages(self, rows_U: Tensor, step: int) -> Tensor:
        """Steps since the vectors were computed, (U,)."""
        return step - self.written_R[rows_U]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {"vectors": self.vectors_RD, "written": self.written_R}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a `state` of the same store.

        Raises:
            UserError: it is another store's.
        """
        vectors_RD = tensors["vectors"]
        if vectors_RD.shape != self.vectors_RD.shape:
            raise UserError(
                f"the checkpoint's content bank holds {tuple(vectors_RD.shape)} (items, columns), "
                f"this run's content {tuple(self.vectors_RD.shape)}: they are of different content "
                "artifacts; start a new run"
            )
        self.vectors_RD.copy_(vectors_RD)
        self.written_R.copy_(tensors["written"])
