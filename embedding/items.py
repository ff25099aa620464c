"""The items behind a batch, for models that read their content: store rows, each item once.

    candidates   histories          rows_U          candidate_B   history_N
    7            [9, 7]             -1 3 5      ->  1             2 1
    4            []                                 0
    9            [4]        with rows {7: 3, 9: 5}  2             0

Item 4 has no content: it shares place 0, whose row is `NO_CONTENT` in every batch.
"""

# Shapes: B samples, N events of all histories, U distinct items of a batch, D content dim.

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

NO_CONTENT = -1
"""Row of an item whose content is not known; always the first of a batch's rows."""


@dataclass(frozen=True)
class ItemHistory:
    """The items of one history of a batch."""

    items_N: Tensor
    """int64 indices into the batch's rows; sample after sample, oldest first."""
    lengths_B: Tensor
    """int64 events a sample."""

    def to(self, device: torch.device, non_blocking: bool = False) -> "ItemHistory":
        """The history on `device`."""
        return ItemHistory(
            self.items_N.to(device, non_blocking=non_blocking),
            self.lengths_B.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class ItemRows:
    """Which items a batch shows and remembers, each distinct one named once."""

    rows_U: Tensor
    """int64 rows of the content store, ascending; `NO_CONTENT` and then others."""
    candidate_B: Tensor
    """int64 index of every sample's candidate in `rows_U`."""
    histories: dict[str, ItemHistory]
    """By name of the history; empty where the model reads no content of histories."""

    @classmethod
    def of(cls, candidate_B: Tensor, histories: Mapping[str, tuple[Tensor, Tensor]]) -> "ItemRows":
        """From store rows: of the candidates, and (rows of all events, lengths) a history."""
        nothing = candidate_B.new_tensor([NO_CONTENT])
        parts = [nothing, candidate_B, *(rows_N for rows_N, _ in histories.values())]
        rows_U, places = torch.unique(torch.cat(parts), return_inverse=True)
        _, own_B, *events = places.split([len(part) for part in parts])
        return cls(
            rows_U,
            own_B,
            {
                name: ItemHistory(items_N, lengths_B)
                for items_N, (name, (_, lengths_B)) in zip(events, histories.items(), strict=True)
            },
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "ItemRows":
        """The same on `device`."""
        return ItemRows(
            self.rows_U.to(device, non_blocking=non_blocking),
            self.candidate_B.to(device, non_blocking=non_blocking),
            {name: h.to(device, non_blocking) for name, h in self.histories.items()},
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory alive until `stream` has used it."""
        for part in self._parts():
            part.record_stream(stream)

    def pin_memory(self) -> "ItemRows":
        """The same in page-locked host memory."""
        return ItemRows(
            self.rows_U.pin_memory(),
            self.candidate_B.pin_memory(),
            {
                name: ItemHistory(h.items_N.pin_memory(), h.lengths_B.pin_memory())
                for name, h in self.histories.items()
            },
        )

    def _parts(self) -> list[Tensor]:
        events = [part for h in self.histories.values() for part in (h.items_N, h.lengths_B)]
        return [self.rows_U, self.candidate_B, *events]


@dataclass(frozen=True)
class ContentVectors:
    """The content of a batch's items, whoever made it: encoder, service or bank."""

    vectors_UD: Tensor
    """One vector a distinct item, in the order of `items.rows_U`; zeros where there is none. In
    training it requires gradient."""
    items: ItemRows


class ItemIndex:
    """Raw item id -> row of the content store."""

    def __init__(self, item_ids: Tensor) -> None:
        """`item_ids`: int64 raw id of every row of the store."""
        self._ids, self._rows = item_ids.sort()
        twice = self._ids[1:][self._ids[1:] == self._ids[:-1]]
        assert not len(twice), f"items {twice[:3].tolist()} have two rows in the content store"

    def __len__(self) -> int:
        return len(self._ids)

    def rows_of(self, item_ids_N: Tensor) -> Tensor:
        """Row of every item; `NO_CONTENT` where the store has none."""
        if not len(self._ids):
            return torch.full_like(item_ids_N, NO_CONTENT)
        places_N = torch.searchsorted(self._ids, item_ids_N).clamp_(max=len(self._ids) - 1)
        found_N = self._ids[places_N] == item_ids_N
        return torch.where(found_N, self._rows[places_N], NO_CONTENT)


@dataclass(frozen=True)
class ItemSource:
    """How a loader finds the items of its samples."""

    index: ItemIndex
    histories: dict[str, str]
    """Sequence feature that holds the item ids, by history."""
