"""The content bank: the last known fused vector of every item, and when it was written.

Fused vectors are what the encoder's last layer reads (`multimodal.content_head`).
"""

# Shapes: R rows of the store, U items, H width of the fused vectors.

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from embedding.errors import UserError


class ContentBank:
    """One vector a store row, on the device of its rank; equal on all ranks."""

    def __init__(
        self,
        item_ids_R: Tensor,
        width: int,
        device: torch.device,
        *,
        tokens: int = 0,
        models: Iterable[int] = (0,),
    ) -> None:
        """An empty bank.

        Args:
            item_ids_R: int64 raw id of every row of the store, on the CPU.
            width: H.
            device: of the vectors.
            tokens: identity of the stored tokens that vectors are made of.
            models: of each tower what its LoRA is fitted to (`tower_files.model_identities`).
        """
        num_rows = len(item_ids_R)
        self.device = device
        self.tokens = torch.tensor([tokens])
        self.models = torch.tensor([*models])
        self.item_ids_R = item_ids_R
        self.fused_RH = torch.zeros(num_rows, width, device=device)
        self.written_R = torch.zeros(num_rows, dtype=torch.int64, device=device)
        """Step before which a vector was computed."""

    @property
    def num_rows(self) -> int:
        """Items of the store."""
        return len(self.item_ids_R)

    def write(self, rows_U: Tensor, fused_UH: Tensor, step: int) -> None:
        """Replace the vectors of distinct rows by those of step `step`."""
        self.fused_RH.index_copy_(0, rows_U, fused_UH)
        self.written_R[rows_U] = step

    def fill(self, fused_RH: Tensor, step: int) -> None:
        """Replace all vectors."""
        self.fused_RH.copy_(fused_RH)
        self.written_R.fill_(step)

    def read(self, rows_U: Tensor) -> Tensor:
        """A copy of the last known vectors, (U, H)."""
        return self.fused_RH.index_select(0, rows_U)

    def ages(self, rows_U: Tensor, step: int) -> Tensor:
        """Steps since the vectors were computed, (U,)."""
        return step - self.written_R[rows_U]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return {
            "item_ids": self.item_ids_R,
            "fused": self.fused_RH,
            "written": self.written_R,
            "tokens": self.tokens,
            "models": self.models,
        }

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a `state` is one of the same items."""
        same_items = "item_ids" in tensors and self.item_ids_R.equal(tensors["item_ids"])
        return same_items and tensors["fused"].shape == self.fused_RH.shape

    def has_tokens_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a `state` is one of the same items, and their texts and images are the same.

        Not of which encoder it is, and the vectors, most of it, are not looked at.
        """
        same_tokens = self.tokens.equal(tensors["tokens"])
        return same_tokens and self.item_ids_R.equal(tensors["item_ids"])

    def other_models(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Why an encoder with this `state` of the bank does not fit the towers; None if it does."""
        if "models" not in tensors:
            return "its checkpoint is of a version that does not say on which towers it was trained"
        if self.models.equal(tensors["models"]):
            return None
        return "was trained on other towers (other files of a model, or cut at another layer)"

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a `state`.

        Raises:
            UserError: it is one of other items.
        """
        if self.num_rows and not self.fits(tensors):
            raise UserError(
                "the content bank of the checkpoint is of other items or another content.fusion "
                "than this run's content: start a new run, or restore the content artifact"
            )
        if self.num_rows:
            self.fused_RH.copy_(tensors["fused"])
            self.written_R.copy_(tensors["written"])
