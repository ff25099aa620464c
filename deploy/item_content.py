"""Content vectors of items: those of a bundle's bank, and of items that training did not know."""

# Shapes: R items of the bank, N added items, M modalities, U items of a batch, D dim.

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from deploy.bundle import CONTENT_FILE, load_tensors
from embedding.items import NO_CONTENT, ContentVectors, ItemIndex, ItemRows


@dataclass(frozen=True)
class AddedItems:
    """Items that training did not know, encoded with the bundle's own encoder."""

    item_ids_N: Tensor
    """Raw ids."""
    digests_NM: Tensor
    """Of the text and image that were encoded."""
    vectors_ND: Tensor

    def reusable(self, item_ids_N: Tensor, digests_NM: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some items are here with the same content (bool), and the vectors of those."""
        rows_N = ItemIndex(self.item_ids_N).rows_of(item_ids_N)
        is_same_N = rows_N != NO_CONTENT
        is_same_N[is_same_N.clone()] = (
            self.digests_NM[rows_N[is_same_N]] == digests_NM[is_same_N]
        ).all(dim=1)
        return is_same_N, self.vectors_ND[rows_N[is_same_N]]


@dataclass(frozen=True)
class ItemContent:
    """The vectors that a model scores with; it never changes. Any other item has zeros."""

    bank_ids_R: Tensor
    """Raw ids of the items that training knew."""
    bank_RD: Tensor
    """As training left them."""
    added: AddedItems | None = None

    @classmethod
    def load(cls, directory: Path) -> "ItemContent":
        """The bank of a bundle."""
        stored = load_tensors(directory / CONTENT_FILE)
        return cls(stored["item_ids"], stored["vectors"])

    def with_added(self, added: AddedItems) -> "ItemContent":
        """The same bank, and these added items instead of those before."""
        return replace(self, added=added)

    @property
    def item_ids(self) -> Tensor:
        """Raw ids by row: first the bank's, then those of added items."""
        if self.added is None:
            return self.bank_ids_R
        return torch.cat([self.bank_ids_R, self.added.item_ids_N])

    def of(self, items: ItemRows) -> ContentVectors:
        """Those of a batch's items."""
        known_U = items.rows_U[1:]
        nothing_1D = self.bank_RD.new_zeros(1, self.bank_RD.shape[1])
        size = len(self.bank_ids_R)
        # Rows ascend, so those of the bank come first; it is not copied for the added ones.
        bank_U, added_U = known_U.tensor_split([int(torch.searchsorted(known_U, size))])
        parts = [nothing_1D, self.bank_RD.index_select(0, bank_U)]
        if self.added is not None:
            parts.append(self.added.vectors_ND.index_select(0, added_U - size))
        return ContentVectors(torch.cat(parts), items)
