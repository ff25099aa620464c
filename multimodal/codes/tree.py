"""From codes back to items: prefixes, groups of items with equal codes, and telling those apart."""

# Shapes: N items, L levels.

from dataclasses import dataclass

import numpy as np

from embedding.errors import UserError
from multimodal.codes.vectors import Int32Array, Int64Array


@dataclass(frozen=True)
class CodeTree:
    """Items ordered by their codes, so that the items of a prefix lie together."""

    order_N: Int64Array
    """Item positions, by code; items with equal codes by position."""
    sorted_NL: Int32Array
    """Codes in that order."""

    @classmethod
    def of(cls, codes_NL: Int32Array) -> "CodeTree":
        """The tree of the items at positions 0 .. N - 1."""
        order = np.lexsort(codes_NL.T[::-1])
        return cls(order, codes_NL[order])

    def items(self, prefix: tuple[int, ...]) -> Int64Array:
        """Positions of the items whose code begins with `prefix`, in ascending order.

        Raises:
            UserError: the prefix is longer than a code.
        """
        start, end = self._range(prefix)
        return np.sort(self.order_N[start:end])

    def children(self, prefix: tuple[int, ...] = ()) -> dict[int, int]:
        """The codes that follow `prefix`, and how many items have each, most items first."""
        start, end = self._range(prefix)
        if len(prefix) == self.sorted_NL.shape[1]:
            return {}
        codes, counts = np.unique(self.sorted_NL[start:end, len(prefix)], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {int(codes[i]): int(counts[i]) for i in order}

    def _range(self, prefix: tuple[int, ...]) -> tuple[int, int]:
        if len(prefix) > self.sorted_NL.shape[1]:
            raise UserError(
                f"code {prefix} has {len(prefix)} levels and codes have {self.sorted_NL.shape[1]}; "
                "give at most that many numbers"
            )
        start, end = 0, len(self.sorted_NL)
        for level, code in enumerate(prefix):
            column = self.sorted_NL[start:end, level]
            start, end = (
                start + int(np.searchsorted(column, code)),
                start + int(np.searchsorted(column, code, side="right")),
            )
        return start, end


def code_groups(codes_NL: Int32Array) -> tuple[Int64Array, Int64Array]:
    """Items with equal codes.

    Returns:
        The group (N,) of every item, numbered by code, and the number of items of every group.
    """
    group_N = np.zeros(len(codes_NL), np.int64)
    # Level by level: all levels as one number do not fit into 64 bits.
    for code_N in codes_NL.T:
        _, group_N = np.unique(
            group_N * (int(code_N.max(initial=0)) + 1) + code_N, return_inverse=True
        )
    return group_N, np.bincount(group_N)


@dataclass(frozen=True)
class Suffixes:
    """A number per item that tells items with equal codes apart."""

    suffix_N: Int32Array
    num_shared: int
    """Items that found no number of their own and share the last one."""


@dataclass(frozen=True)
class CodedItems:
    """Items with codes and suffixes, as an earlier day wrote them."""

    item_ids_N: Int64Array
    codes_NL: Int32Array
    suffix_N: Int32Array


def tell_apart(
    item_ids_N: Int64Array,
    codes_NL: Int32Array,
    num_codes: int,
    earlier: CodedItems | None = None,
) -> Suffixes:
    """Number the items of every code from 0.

    An item that had its code the day before keeps its number, so that its full code goes on meaning
    that item; new ones get the smallest free numbers, in the order of their ids.

    Args:
        item_ids_N: the items, each once.
        codes_NL: their codes.
        num_codes: numbers there are; the last is shared by those that find none.
        earlier: the result of the day before.
    """
    group_N, sizes = code_groups(codes_NL)
    kept_N = np.full(len(item_ids_N), -1, np.int64)
    if earlier is not None:
        _, now, before = np.intersect1d(item_ids_N, earlier.item_ids_N, return_indices=True)
        same = (codes_NL[now] == earlier.codes_NL[before]).all(axis=1)
        kept_N[now[same]] = earlier.suffix_N[before[same]]
        # Those that shared the last number try again.
        kept_N[kept_N >= num_codes - 1] = -1
    suffix_N = _fill(group_N, sizes, kept_N, item_ids_N)
    is_crowded = np.zeros(len(sizes), np.bool_)
    is_crowded[group_N[suffix_N >= num_codes]] = True
    suffix_N = np.minimum(suffix_N, num_codes - 1)
    # In a group that just fits, the last number is one item's own.
    shares_N = is_crowded[group_N] & (suffix_N == num_codes - 1)
    return Suffixes(suffix_N.astype(np.int32), int(shares_N.sum()))


def _fill(
    group_N: Int64Array, sizes: Int64Array, kept_N: Int64Array, item_ids_N: Int64Array
) -> Int64Array:
    """Give every item without a number (-1) the smallest one that is free in its group.

    In a group of n items of which some keep numbers, the numbers 0 .. n - 1 that are not kept
    suffice; the others' are handed out in order of item id.
    """
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    taken = np.zeros(len(group_N), np.bool_)
    inside = (kept_N >= 0) & (kept_N < sizes[group_N])
    taken[first[group_N[inside]] + kept_N[inside]] = True
    open_cells = np.flatnonzero(~taken)
    cell_group = np.repeat(np.arange(len(sizes)), sizes)[open_cells]
    cell_number = open_cells - first[cell_group]
    seekers = np.flatnonzero(kept_N < 0)
    seekers = seekers[np.lexsort((item_ids_N[seekers], group_N[seekers]))]
    # The r-th seeker of a group gets the group's r-th open cell; some cells may stay open.
    num_open = np.bincount(cell_group, minlength=len(sizes))
    open_start = np.concatenate([[0], np.cumsum(num_open)[:-1]])
    seeker_group = group_N[seekers]
    seeker_start = np.searchsorted(seeker_group, seeker_group)
    number_N = kept_N.copy()
    position = open_start[seeker_group] + np.arange(len(seekers)) - seeker_start
    number_N[seekers] = cell_number[position]
    return number_N
