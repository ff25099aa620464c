"""Swing: item pairs that many otherwise unrelated users engaged with (QARM's Item2Item pairs).

    sim(i, j) = sum over pairs of users {u, v} who engaged with i and with j of
                w_u w_v / (alpha + |I_u and I_v in common|),      w_u = 1 / sqrt(|I_u|)

Two users with a lot in common say little about one more item they share; two who share nothing else
say much. Each unordered pair of users counts once, and i is no neighbour of itself.

An item's similarities need only the users who engaged with it and all their items, so items are
independent of each other: whoever holds the lists of an item's users can finish that item.
"""

# Shapes: U users, M users of one item, N engagements.

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from embedding.raw_ids import mix64
from multimodal.codes.pair_config import Swing
from multimodal.codes.vectors import Float32Array, Int64Array

Float64Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class UserLists:
    """Distinct items of some users: those of user u are `items[offsets[u] : offsets[u + 1]]`."""

    user_ids_U: Int64Array
    offsets: Int64Array
    items_N: Int64Array
    """Raw item ids."""
    totals_U: Int64Array
    """Distinct items of each user before lists were cut: what w_u is computed from."""
    num_cut: int = 0
    """Users whose list was sampled."""

    @property
    def lengths(self) -> Int64Array:
        """Items of each user."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class ItemPairs:
    """Neighbours of items, the most similar first."""

    items: Int64Array
    neighbours: Int64Array
    similarities: Float32Array
    num_common_users: Int64Array
    """Users of the (sampled) lists that engaged with both."""
    num_cut_items: int = 0
    """Items whose users were sampled."""


def user_lists(user_ids_N: Int64Array, item_ids_N: Int64Array, config: Swing) -> UserLists:
    """Distinct items of every user; lists beyond `max_items_per_user` are sampled.

    The sample is a function of seed, user and item: it does not depend on the order of events, on
    partitions or on other items.
    """
    order = np.lexsort((item_ids_N, user_ids_N))
    users, items = user_ids_N[order], item_ids_N[order]
    first = np.ones(len(users), np.bool_)
    first[1:] = (users[1:] != users[:-1]) | (items[1:] != items[:-1])
    users, items = users[first], items[first]
    ids, starts, totals = np.unique(users, return_index=True, return_counts=True)
    keep = _smallest(
        np.repeat(np.arange(len(ids)), totals),
        _draws(users, items, config.seed),
        config.max_items_per_user,
    )
    lengths = np.minimum(totals, config.max_items_per_user)
    return UserLists(
        user_ids_U=ids,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items_N=items[keep],
        totals_U=totals,
        num_cut=int((totals > config.max_items_per_user).sum()),
    )


def join_lists(parts: list[UserLists]) -> UserLists:
    """Lists of different users, one part after the other."""
    lengths = np.concatenate([part.lengths for part in parts])
    return UserLists(
        user_ids_U=np.concatenate([part.user_ids_U for part in parts]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items_N=np.concatenate([part.items_N for part in parts]),
        totals_U=np.concatenate([part.totals_U for part in parts]),
        num_cut=sum(part.num_cut for part in parts),
    )


def swing_pairs(lists: UserLists, config: Swing, items: Int64Array | None = None) -> ItemPairs:
    """Neighbours of items.

    Args:
        lists: all users who engaged with `items`, with all their items.
        config: bounds and thresholds.
        items: whose neighbours are wanted; default: all items of the lists.
    """
    item_ids, columns_N = np.unique(lists.items_N, return_inverse=True)
    rows_N = np.repeat(np.arange(len(lists.user_ids_U)), lists.lengths)
    ones_N = np.ones(len(rows_N), np.float32)
    shape = (len(lists.user_ids_U), len(item_ids))
    by_user = sparse.csr_array((ones_N, columns_N, lists.offsets), shape=shape)
    # Users of an item, in ascending order of row: those of item c are users[ends[c] : ends[c + 1]].
    users = rows_N[np.argsort(columns_N, kind="stable")]
    ends = np.concatenate([[0], np.cumsum(np.bincount(columns_N, minlength=len(item_ids)))])
    weights_U = 1 / np.sqrt(lists.totals_U)
    wanted = np.arange(len(item_ids))
    if items is not None:
        wanted = wanted[np.isin(item_ids, items)]
    found, num_cut = [], 0
    for column in wanted:
        own = users[ends[column] : ends[column + 1]]
        if len(own) < config.min_common_users:
            continue
        if len(own) > config.max_users_per_item:
            num_cut += 1
            own_ids = np.full(len(own), item_ids[column])
            draws = _draws(own_ids, lists.user_ids_U[own], config.seed)
            own = own[_smallest(np.zeros(len(own), np.int64), draws, config.max_users_per_item)]
        found.append(_neighbours(int(column), by_user[own], weights_U[own], config))
    return _as_pairs(found, item_ids, num_cut)


def _neighbours(
    column: int, lists_MI: Any, weights_M: Float64Array, config: Swing
) -> tuple[int, Int64Array, Float64Array, Int64Array]:
    """The best neighbours of one item, from the lists of its users."""
    # Only columns that occur: the product is then as narrow as what these users engaged with.
    columns, local = np.unique(lists_MI.indices, return_inverse=True)
    engaged_MI = sparse.csr_array(
        (lists_MI.data.astype(np.float64), local, lists_MI.indptr),
        shape=(lists_MI.shape[0], len(columns)),
    )
    shared_MM = (engaged_MI @ engaged_MI.T).toarray()
    pair_MM = weights_M[:, None] * weights_M / (config.alpha + shared_MM)
    np.fill_diagonal(pair_MM, 0.0)
    common = np.asarray(engaged_MI.sum(axis=0)).round().astype(np.int64)
    # Most items of an item's users are another user's alone: the product below is dense.
    good = np.flatnonzero((common >= config.min_common_users) & (columns != column))
    columns, common, engaged_MI = columns[good], common[good], engaged_MI[:, good]
    # sum over u, v of pair[u, v] a[u, j] a[v, j] counts every pair of users twice.
    reached_MI = engaged_MI.T.dot(pair_MM).T
    similarities = engaged_MI.multiply(reached_MI).sum(axis=0) / 2
    best = np.lexsort((columns, -similarities))[: config.num_neighbours]
    return column, columns[best], similarities[best], common[best]


def _as_pairs(
    found: list[tuple[int, Int64Array, Float64Array, Int64Array]],
    item_ids: Int64Array,
    num_cut: int,
) -> ItemPairs:
    if not found:
        none = np.empty(0, np.int64)
        return ItemPairs(none, none, np.empty(0, np.float32), none, num_cut)
    counts = [len(columns) for _, columns, _, _ in found]
    return ItemPairs(
        items=np.repeat(item_ids[[column for column, _, _, _ in found]], counts),
        neighbours=item_ids[np.concatenate([columns for _, columns, _, _ in found])],
        similarities=np.concatenate([values for _, _, values, _ in found]).astype(np.float32),
        num_common_users=np.concatenate([common for _, _, _, common in found]),
        num_cut_items=num_cut,
    )


def _draws(first: Int64Array, second: Int64Array, seed: int) -> np.ndarray[Any, Any]:
    """Pseudo-random numbers, a function of the two ids and the seed."""
    key = mix64(np.asarray(first, np.int64)) ^ np.uint64(seed)
    return mix64(
        (mix64(key.view(np.int64)) ^ np.asarray(second, np.int64).view(np.uint64)).view(np.int64)
    )


def _smallest(groups: Int64Array, draws: np.ndarray[Any, Any], limit: int) -> Int64Array:
    """Positions of the `limit` smallest draws of each group, in ascending order.

    `groups` is sorted.
    """
    order = np.lexsort((draws, groups))
    starts = np.searchsorted(groups, groups)
    rank = np.arange(len(groups)) - starts
    return np.sort(order[rank < limit])
