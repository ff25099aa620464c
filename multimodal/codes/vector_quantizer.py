"""VQ codes: the codebook is the set of all aligned item vectors, frozen when it was taken.

The code of an item is the list of its nearest other items. Itself would be no content but a second
item id, which training learns by heart and a later item, which is not in the set, does not have. A
code is a *slot*, the number of a codebook item, and a code table has one row per slot behind the
OOV row.

Slots survive a refit: an item that is still there keeps its slot, new items take the slots of items
that are gone, then new slots. So a slot means the same item before and after.
"""

# Shapes: N slots, B items, D vector dim, k neighbours.

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from embedding.errors import UserError
from multimodal.codes.config import Vq
from multimodal.codes.neighbours import Index, build_index, exact_order, read_index, save_index
from multimodal.codes.residual_quantizer import CPU
from multimodal.codes.vectors import (
    Float32Array,
    FloatArray,
    Int32Array,
    Int64Array,
    blocks,
    check_finite,
    check_vectors,
    row_digests,
    unit_rows,
)

_ROWS_PER_BLOCK = 1 << 13
FREE = -1
"""Item id of a slot that no item has, and the code where fewer than `top_k` items were found."""


@dataclass(frozen=True)
class ItemCodebook:
    """Items by slot."""

    item_ids_N: Int64Array
    """`FREE` where no item has the slot."""
    vectors_ND: Float32Array
    """Unit vectors; zeros in free slots."""

    @property
    def num_codes(self) -> int:
        """Slots."""
        return len(self.item_ids_N)

    def slots_of(self, item_ids_B: Int64Array) -> Int64Array:
        """Slot of each item; `FREE` for those that are not in the set."""
        slots = np.flatnonzero(self.item_ids_N != FREE)
        if not len(slots):
            return np.full(len(item_ids_B), FREE)
        slots = slots[np.argsort(self.item_ids_N[slots])]
        at_B = np.searchsorted(self.item_ids_N[slots], item_ids_B).clip(max=len(slots) - 1)
        return np.where(self.item_ids_N[slots[at_B]] == item_ids_B, slots[at_B], FREE)

    def neighbours(
        self, config: Vq, device: torch.device = CPU, file: Path | None = None
    ) -> "ItemNeighbours":
        """A search structure; built once, then used for many items.

        Args:
            config: how many neighbours, and how they are found.
            device: of an exact search.
            file: of an approximate index of these items (`ItemNeighbours.save`); None: build it.
        """
        slots = np.flatnonzero(self.item_ids_N != FREE)
        # Behind so many equal items, of lower slots, nobody finds another one.
        slots = slots[_ranks_among_equals(self._vectors_of(slots)) <= config.top_k]
        vectors_ND = np.ascontiguousarray(self._vectors_of(slots))
        index = build_index(vectors_ND, config.index, device) if file is None else read_index(file)
        return ItemNeighbours(slots, vectors_ND, index, config.top_k)

    def _vectors_of(self, slots: Int64Array) -> Float32Array:
        """Of ascending slots; all of them without a copy."""
        return self.vectors_ND if len(slots) == self.num_codes else self.vectors_ND[slots]


@dataclass(frozen=True)
class ItemNeighbours:
    """Looks up VQ codes."""

    slots: Int64Array
    vectors_ND: Float32Array
    """Of these slots."""
    index: Index
    top_k: int

    def save(self, file: Path) -> Path | None:
        """Write the index where building it takes long; None: nothing worth it."""
        return save_index(self.index, file)

    def encode(self, vectors_BD: FloatArray, own_B: Int64Array | None = None) -> Int32Array:
        """Slots (B, top_k) of the nearest items, the nearest first; `FREE` behind the last one.

        Args:
            vectors_BD: of the items.
            own_B: their own slots, which they leave out; `FREE` for items that have none.

        Raises:
            UserError: vectors of another dimension, or with NaN or infinity.
        """
        if vectors_BD.ndim != 2 or vectors_BD.shape[1] != self.vectors_ND.shape[1]:
            raise UserError(
                f"the codebooks hold item vectors of {self.vectors_ND.shape[1]} dimensions, these "
                f"have shape {vectors_BD.shape}; use the encoder they were made with, or fit new "
                "codebooks"
            )
        codes = np.empty((len(vectors_BD), self.top_k), np.int32)
        for start, block_BD in blocks(vectors_BD, _ROWS_PER_BLOCK):
            check_finite(block_BD, start)
            rows = slice(start, start + len(block_BD))
            codes[rows] = self._encode_block(block_BD, None if own_B is None else own_B[rows])
        return codes

    def _encode_block(self, vectors_BD: FloatArray, own_B: Int64Array | None) -> Int32Array:
        count = self.top_k if own_B is None else self.top_k + 1
        found = exact_order(self.index, self.vectors_ND, vectors_BD, count)
        codes = np.where(found < 0, FREE, self.slots[found]).astype(np.int32)
        if own_B is not None:
            is_own = codes == own_B[:, None]
            codes[is_own] = FREE
            # What is left keeps its order; free places go to the end.
            codes = np.take_along_axis(codes, np.argsort(codes == FREE, axis=1, kind="stable"), 1)
        missing = max(0, self.top_k - codes.shape[1])
        return np.pad(codes[:, : self.top_k], ((0, 0), (0, missing)), constant_values=FREE)


def take_item_codebook(
    item_ids_B: Int64Array, vectors_BD: FloatArray, earlier: ItemCodebook | None = None
) -> ItemCodebook:
    """The codebook of a set of items; with `earlier`, its items keep their slots.

    Raises:
        UserError: an item occurs twice, or vectors are unusable.
    """
    check_vectors(vectors_BD)
    distinct, counts = np.unique(item_ids_B, return_counts=True)
    if len(distinct) < len(item_ids_B) or len(item_ids_B) != len(vectors_BD):
        raise UserError(
            f"{len(vectors_BD)} item vectors for {len(item_ids_B)} item ids, {len(distinct)} of "
            f"them different (item {distinct[counts.argmax()]} {counts.max()} times); give every "
            "item one vector"
        )
    slots_B = _slots(item_ids_B, earlier)
    num_slots = max(int(slots_B.max()) + 1, earlier.num_codes if earlier else 0)
    ids = np.full(num_slots, FREE, np.int64)
    vectors = np.zeros((num_slots, vectors_BD.shape[1]), np.float32)
    ids[slots_B], vectors[slots_B] = item_ids_B, unit_rows(vectors_BD)
    return ItemCodebook(ids, vectors)


def restate_items(
    book: ItemCodebook, item_ids_B: Int64Array, vectors_BD: FloatArray
) -> ItemCodebook:
    """The same slots with the vectors of a new encoder; items without one leave theirs."""
    ids = np.full(book.num_codes, FREE, np.int64)
    vectors = np.zeros((book.num_codes, vectors_BD.shape[1]), np.float32)
    _, now, slots = np.intersect1d(item_ids_B, book.item_ids_N, return_indices=True)
    ids[slots], vectors[slots] = item_ids_B[now], unit_rows(vectors_BD[now])
    return ItemCodebook(ids, vectors)


def _ranks_among_equals(vectors_ND: Float32Array) -> Int64Array:
    """How many equal rows stand before each row."""
    _, group_N, sizes = np.unique(row_digests(vectors_ND), return_inverse=True, return_counts=True)
    order = np.argsort(group_N, kind="stable")
    first = np.cumsum(sizes) - sizes
    ranks = np.empty(len(vectors_ND), np.int64)
    ranks[order] = np.arange(len(order)) - np.repeat(first, sizes)
    return ranks


def _slots(item_ids_B: Int64Array, earlier: ItemCodebook | None) -> Int64Array:
    if earlier is None:
        return np.arange(len(item_ids_B))
    slots_B = np.full(len(item_ids_B), FREE, np.int64)
    _, now, before = np.intersect1d(item_ids_B, earlier.item_ids_N, return_indices=True)
    survives = item_ids_B[now] != FREE
    slots_B[now[survives]] = before[survives]
    new = np.flatnonzero(slots_B == FREE)
    free = np.setdiff1d(np.arange(earlier.num_codes), slots_B)[: len(new)]
    more = earlier.num_codes + np.arange(len(new) - len(free))
    slots_B[new] = np.concatenate([free, more])
    return slots_B
