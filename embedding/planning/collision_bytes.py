"""What TorchRec's managed collision holds beside a table's rows: its map, ids in wait, evictions.

Between two evictions every id of every step is kept, in buffers that the first step gives their
size, with a quarter more. An eviction sorts them, and the map.
"""

from dataclasses import dataclass

from embedding.config import ManagedCollision

_WORD_BYTES = 8
_SLACK = 1.25


@dataclass(frozen=True)
class _Words:
    """64-bit numbers that a policy keeps."""

    row: int
    """In the map: the id, its row, what the policy knows of it."""
    waiting: int
    """For an id that waits: the id, and what the policy notes of it."""
    evicted_row: int
    """While rows are evicted, for every row. Counted in TorchRec's operations on the CPU."""
    evicted_id: int
    """For every distinct id that waited."""


_POLICIES = {
    "lfu": _Words(row=3, waiting=1, evicted_row=3, evicted_id=12),
    "lru": _Words(row=3, waiting=2, evicted_row=3, evicted_id=15),
    "distance_lfu": _Words(row=4, waiting=2, evicted_row=5, evicted_id=17),
}


@dataclass(frozen=True)
class CollisionBytes:
    """Of one rank."""

    held: float
    """All the time, from the first step on."""
    eviction: float
    """More while rows are evicted."""
    saved: float
    """Of it in a checkpoint: rows follow from the order, and buffers are cut to what waits."""


def collision_bytes(
    scheme: ManagedCollision, num_rows: float, ids_per_step: float, distinct_ids: float
) -> CollisionBytes:
    """Bytes of a rank.

    Args:
        scheme: the table's.
        num_rows: of the rank.
        ids_per_step: that the rank receives.
        distinct_ids: among those that it receives between two evictions.
    """
    words = _POLICIES[scheme.eviction]
    waiting = ids_per_step * scheme.eviction_interval_steps
    return CollisionBytes(
        held=_WORD_BYTES * (words.row * num_rows + _SLACK * words.waiting * waiting),
        eviction=_WORD_BYTES * (words.evicted_row * num_rows + words.evicted_id * distinct_ids),
        saved=_WORD_BYTES * ((words.row - 1) * num_rows + words.waiting * waiting),
    )
