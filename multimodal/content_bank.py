"""The content bank: the last known vector of every item, and when it was written."""

# Shapes: R rows of the store, U items, D content dim.

from collections.abc import Mapping

import torch
from torch import Tensor

from embedding.errors import UserError


class ContentBank:
    """One vector a store row, on the device of its rank; equal on all ranks."""

    def __init__(
        self, item_ids_R: Tensor, dim: int, device: torch.device, *, tokens: int = 0
    ) -> None:
        """An empty bank.

        Args:
            item_ids_R: int64 raw id of every row of the store, on the CPU.
            dim: D.
            device: of the vectors.
            tokens: identity of the stored tokens that vectors are made of.
        """
        num_rows = len(item_ids_R)
        self.device = device
        self.tokens = torch.tensor([tokens])
        self.item_ids_R = item_ids_R
        self.vectors_RD = torch.zeros(num_rows, dim, device=device)
        self.written_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        """Step before which a vector was computed."""

    @property
    def num_rows(self) -> int:
        """Items of the store."""
        return len(self.item_ids_R)

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
        return {
            "item_ids": self.item_ids_R,
            "vectors": self.vectors_RD,
            "written": self.written_R,
            "tokens": self.tokens,
        }

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a `state` is one of the same items."""
        same_items = "item_ids" in tensors and self.item_ids_R.equal(tensors["item_ids"])
        return same_items and tensors["vectors"].shape == self.vectors_RD.shape

    def has_tokens_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a `state` is one of the same items, and their texts and images are the same."""
        return self.fits(tensors) and self.tokens.equal(tensors.get("tokens", self.tokens - 1))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a `state`.

        Raises:
            UserError: it is one of other items.
        """
        if self.num_rows and not self.fits(tensors):
            raise UserError(
                "the content bank of the checkpoint is of other items or another content.dim than "
                "this run's content: start a new run, or restore the content artifact"
            )
        if self.num_rows:
            self.vectors_RD.copy_(tensors["vectors"])
            self.written_R.copy_(tensors["written"])
