"""User2Item pairs: a positive, and the earlier positive of its user that resembles it most.

"Resembles" is measured by ID vectors (the ranker's item table of the day before, or a table of a
factorisation model on day one), so a pair is two items that behaviour holds for alike; the content
encoder then learns to hold them for alike too.
"""

# Shapes: B targets, N items or past events of all targets, R vectors, D vector dim.

from dataclasses import dataclass

import numpy as np

from multimodal.codes.pair_config import User2Item
from multimodal.codes.vectors import Float32Array, FloatArray, Int64Array, unit_rows

_EVENTS_PER_BLOCK = 1 << 18


@dataclass(frozen=True)
class IdVectors:
    """Item vectors by id. Items may share one: a hashed table has fewer rows than there are ids."""

    sorted_ids_N: Int64Array
    rows_N: Int64Array
    """Row of each of these ids."""
    unit_RD: Float32Array

    @classmethod
    def of(cls, item_ids_N: Int64Array, vectors_ND: FloatArray) -> "IdVectors":
        """A vector an item, in any order of ids; lengths do not matter."""
        return cls.shared(item_ids_N, np.arange(len(item_ids_N)), vectors_ND)

    @classmethod
    def shared(
        cls, item_ids_N: Int64Array, rows_N: Int64Array, vectors_RD: FloatArray
    ) -> "IdVectors":
        """The vector of item n is row `rows_N[n]`; ids in any order, lengths do not matter."""
        order = np.argsort(item_ids_N, kind="stable")
        return cls(item_ids_N[order], rows_N[order], unit_rows(vectors_RD))

    def rows_of(self, ids: Int64Array) -> Int64Array:
        """Row of each id, -1 for unknown ones."""
        if not len(self.sorted_ids_N):
            return np.full(len(ids), -1, np.int64)
        at = np.minimum(np.searchsorted(self.sorted_ids_N, ids), len(self.sorted_ids_N) - 1)
        return np.asarray(np.where(self.sorted_ids_N[at] == ids, self.rows_N[at], -1))


@dataclass(frozen=True)
class TriggerPairs:
    """Targets that found a trigger."""

    rows: Int64Array
    """Of the target."""
    triggers: Int64Array
    targets: Int64Array
    similarities: Float32Array
    counts: dict[str, int]
    """Targets without a trigger, by reason."""


def trigger_pairs(
    target_ids_B: Int64Array,
    offsets: Int64Array,
    past_ids_N: Int64Array,
    vectors: IdVectors,
    config: User2Item,
) -> TriggerPairs:
    """The most similar past item of every target; among equals the latest.

    Items without a vector are passed over, and so are those that share the target's: first of all
    the target itself.

    Args:
        target_ids_B: items of positive events of the training period.
        offsets: the earlier positives of target b are `past_ids_N[offsets[b] : offsets[b + 1]]`,
            strictly before it in time, the latest last.
        past_ids_N: items of the earlier positives of all targets.
        vectors: ID vectors.
        config: how far back to look.
    """
    ends = offsets[1:]
    starts = np.maximum(offsets[:-1], ends - config.num_looked_at)
    target_at = vectors.rows_of(target_ids_B)
    lengths = np.where(target_at >= 0, ends - starts, 0)
    best = np.full(len(target_ids_B), -1, np.int64)
    score = np.full(len(target_ids_B), -np.inf, np.float32)
    for block in _blocks(lengths):
        _best_past(block, starts, lengths, target_at, (past_ids_N, vectors, best, score))
    rows = np.flatnonzero(best >= 0)
    unknown = int((target_at < 0).sum())
    no_past = int(((target_at >= 0) & (lengths == 0)).sum())
    return TriggerPairs(
        rows=rows,
        triggers=past_ids_N[best[rows]],
        targets=target_ids_B[rows],
        similarities=score[rows],
        counts={
            "target_without_vector": unknown,
            "no_earlier_positive": no_past,
            "no_other_item_with_vector": len(target_ids_B) - len(rows) - unknown - no_past,
        },
    )


def _best_past(
    block: slice,
    starts: Int64Array,
    lengths: Int64Array,
    target_at: Int64Array,
    state: tuple[Int64Array, IdVectors, Int64Array, Float32Array],
) -> None:
    """Fill `best` (a past event) and `score` of a block of targets."""
    past_ids_N, vectors, best, score = state
    length = lengths[block]
    has = np.flatnonzero(length) + block.start
    if not len(has):
        return
    length = lengths[has]
    first = np.concatenate([[0], np.cumsum(length)[:-1]])
    events = np.arange(length.sum()) + np.repeat(starts[has] - first, length)
    past_at = vectors.rows_of(past_ids_N[events])
    own_at = np.repeat(target_at[has], length)
    similar = np.einsum("nd,nd->n", vectors.unit_RD[past_at], vectors.unit_RD[own_at])
    similar[(past_at < 0) | (past_at == own_at)] = -np.inf
    top = np.maximum.reduceat(similar, first)
    # The last event that reaches the maximum.
    is_top = similar == np.repeat(top, length)
    last = np.maximum.reduceat(np.where(is_top, np.arange(len(events)), -1), first)
    found = np.isfinite(top)
    best[has[found]] = events[last[found]]
    score[has] = top


def _blocks(lengths: Int64Array) -> list[slice]:
    """Consecutive targets with about `_EVENTS_PER_BLOCK` past events together."""
    if not len(lengths):
        return []
    total = np.cumsum(lengths)
    cuts = np.searchsorted(total, np.arange(_EVENTS_PER_BLOCK, total[-1], _EVENTS_PER_BLOCK)) + 1
    edges = np.unique(np.concatenate([[0], cuts, [len(lengths)]]))
    return [slice(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
