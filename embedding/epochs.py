"""Which rank trains which rows of an epoch, and where to go on after an interruption. Pure.

An epoch is a sequence of chunks. A chunk is a few row groups whose rows are permuted together, so
rows are shuffled over files and row groups while a rank still reads whole row groups:

    row groups of all files, shuffled   g3 g0 | g5 g1 | g4 g2
    chunks, rows permuted inside        ----0---- ----1---- ----2----
    shares of two ranks                 --------rank 0------|--------rank 1--

Everything follows from (seed, epoch) and the rows per row group, so no rank needs to talk to
another, and a position in the epoch is only the list of legs (world size, batch size, steps) run
so far.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import NonNegativeInt, PositiveInt

from embedding.config import StrictConfig

SHUFFLED_CHUNK_ROWS = 1 << 18
"""Rows permuted together; four row groups of the usual size."""


class Leg(StrictConfig):
    """A part of an epoch trained without interruption."""

    world_size: PositiveInt
    batch_size_per_rank: PositiveInt
    steps: NonNegativeInt


class Position(StrictConfig):
    """How far training is in the data. The same on every rank."""

    epoch: NonNegativeInt = 0
    legs: tuple[Leg, ...] = ()
    """What was trained of this epoch, oldest leg first."""

    def after(self, leg: Leg) -> "Position":
        """The position after one more leg of the same epoch."""
        return Position(epoch=self.epoch, legs=(*self.legs, leg))


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a chunk, counted in the chunk's permuted order."""

    chunk: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Rows of the segment."""
        return self.stop - self.start


@dataclass(frozen=True)
class EpochPlan:
    """The order of all rows in one epoch; equal on every rank."""

    chunks: tuple[tuple[int, ...], ...]
    """Row group numbers of every chunk."""
    rows_per_chunk: tuple[int, ...]
    seed: tuple[int, int] | None
    """(seed, epoch); None keeps the order of the files."""

    @classmethod
    def shuffled(
        cls,
        rows_per_group: Sequence[int],
        *,
        seed: int,
        epoch: int,
        chunk_rows: int = SHUFFLED_CHUNK_ROWS,
    ) -> Self:
        """Row groups in random order, cut into chunks of at least `chunk_rows` rows."""
        order = np.random.default_rng([seed, epoch]).permutation(len(rows_per_group))
        chunks: list[tuple[int, ...]] = []
        first, rows = 0, 0
        for last, group in enumerate(order.tolist(), start=1):
            rows += rows_per_group[group]
            if rows >= chunk_rows or last == len(order):
                chunks.append(tuple(order[first:last].tolist()))
                first, rows = last, 0
        return cls(tuple(chunks), _rows(chunks, rows_per_group), (seed, epoch))

    @classmethod
    def sequential(cls, rows_per_group: Sequence[int]) -> Self:
        """The order of the files, one row group a chunk."""
        chunks = [(group,) for group in range(len(rows_per_group))]
        return cls(tuple(chunks), _rows(chunks, rows_per_group), None)

    def order(self, segment: Segment) -> npt.NDArray[np.int64]:
        """Row numbers inside the segment's chunk (as read), in training order."""
        if self.seed is None:
            return np.arange(segment.start, segment.stop, dtype=np.int64)
        rng = np.random.default_rng([*self.seed, 1 + segment.chunk])
        order: npt.NDArray[np.int64] = rng.permutation(self.rows_per_chunk[segment.chunk])
        return order[segment.start : segment.stop]

    def remaining(self, legs: Iterable[Leg]) -> tuple[Segment, ...]:
        """What is left of the epoch after `legs`."""
        left = tuple(Segment(c, 0, rows) for c, rows in enumerate(self.rows_per_chunk) if rows)
        for leg in legs:
            shares = split(left, leg.world_size)
            done = leg.steps * leg.batch_size_per_rank
            left = tuple(part for share in shares for part in cut(share, done, num_rows(share)))
        return left


def split(segments: Sequence[Segment], world_size: int) -> list[tuple[Segment, ...]]:
    """Contiguous shares, one a rank, that differ by at most one row.

    After s steps of B rows on every rank, splitting what remains over the same number of ranks
    gives every rank the rest of its own share: that makes a resume exact.
    """
    base, extra = divmod(num_rows(segments), world_size)
    bounds = [rank * base + min(rank, extra) for rank in range(world_size + 1)]
    return [cut(segments, bounds[rank], bounds[rank + 1]) for rank in range(world_size)]


def cut(segments: Sequence[Segment], start: int, stop: int) -> tuple[Segment, ...]:
    """Rows [start, stop) of the concatenated segments."""
    kept, offset = [], 0
    for segment in segments:
        first, last = max(start - offset, 0), min(stop - offset, segment.num_rows)
        if first < last:
            kept.append(Segment(segment.chunk, segment.start + first, segment.start + last))
        offset += segment.num_rows
    return tuple(kept)


def num_rows(segments: Iterable[Segment]) -> int:
    """Rows of all segments."""
    return sum(segment.num_rows for segment in segments)


def rows_left(num_rows: int, legs: Iterable[Leg]) -> int:
    """Rows of `EpochPlan.remaining` in an epoch of so many, without making the segments."""
    for leg in legs:
        base, num_longer = divmod(num_rows, leg.world_size)
        done = leg.steps * leg.batch_size_per_rank
        num_rows -= num_longer * min(base + 1, done)
        num_rows -= (leg.world_size - num_longer) * min(base, done)
    return num_rows


def num_steps(total_rows: int, world_size: int, batch_size_per_rank: int) -> int:
    """Steps every rank makes for `total_rows`; the last one may hold filling rows."""
    return -(-total_rows // (world_size * batch_size_per_rank))


def _rows(chunks: Sequence[Sequence[int]], rows_per_group: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(rows_per_group[group] for group in chunk) for chunk in chunks)
