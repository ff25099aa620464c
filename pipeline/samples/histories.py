"""Point-in-time histories: which earlier events of its user each event may see.

Nothing is copied to find them: over events sorted by user and time, the history of an event is a
span of the user's qualifying events, so two integers an event are enough, and the lists are
gathered row group by row group when they are written.

    row         0   1   2   3   4   5        user a: rows 0-3, user b: rows 4-5
    timestamp   1   2   2   7   3   9
    qualifies   y   n   y   y   y   n        sources = rows 0, 2, 3, 4
    history     -   0   0   0,2 -   4        ties (rows 1, 2) do not see each other
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embedding.raw_ids import Int64Array

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class UserTimeline:
    """Events sorted by user and timestamp, with the borders of users and of equal timestamps."""

    timestamps: Int64Array
    user_starts: Int64Array
    """For each event: the first row of its user."""
    tie_starts: Int64Array
    """For each event: the first row of its user with the same timestamp."""

    @classmethod
    def of(cls, user_ids: Int64Array, timestamps: Int64Array) -> "UserTimeline":
        """Borders in events sorted by `user_ids`, then `timestamps`."""
        rows = np.arange(len(user_ids))
        new_user = np.ones(len(rows), np.bool_)
        new_user[1:] = user_ids[1:] != user_ids[:-1]
        new_time = new_user.copy()
        new_time[1:] |= timestamps[1:] != timestamps[:-1]
        return cls(
            timestamps,
            np.maximum.accumulate(np.where(new_user, rows, 0)),
            np.maximum.accumulate(np.where(new_time, rows, 0)),
        )

    def first_within(self, delay: int) -> Int64Array:
        """For each event: the first row of its user that is at most `delay` earlier."""
        if not delay or not len(self.timestamps):
            return self.tie_starts
        # One ascending key for users and times; a user's times lie in a range of their own.
        since = self.timestamps - self.timestamps.min()
        user = np.cumsum(self.user_starts == np.arange(len(since)))
        keys = user * (int(since.max()) + 1) + since
        return np.maximum(np.searchsorted(keys, keys - delay, side="left"), self.user_starts)


@dataclass(frozen=True)
class HistorySpans:
    """The history of event i: rows `sources[ends[i] - lengths[i] : ends[i]]`, oldest first."""

    sources: Int64Array
    ends: Int64Array
    lengths: Int64Array

    def gather(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Histories of some events.

        Returns:
            Offsets (one more than `rows`) and the rows of all past events, one after the other.
        """
        positions, offsets = ragged_positions(
            self.ends[rows] - self.lengths[rows], self.lengths[rows]
        )
        return offsets, self.sources[positions]


def history_spans(
    timeline: UserTimeline, qualifies: BoolArray, max_length: int, delay: int = 0
) -> HistorySpans:
    """The latest `max_length` qualifying events of the same user strictly before each event.

    Args:
        timeline: of all events.
        qualifies: which of them enter the history.
        max_length: of a history.
        delay: how long after its timestamp an event enters.
    """
    before = _counts_before(qualifies)
    ends = before[timeline.first_within(delay)]
    lengths = np.minimum(ends - before[timeline.user_starts], max_length)
    return HistorySpans(np.flatnonzero(qualifies), ends, lengths)


def retained(
    timeline: UserTimeline, qualifies: BoolArray, max_length: int, entered: BoolArray | bool = True
) -> BoolArray:
    """True for the qualifying events of each user that later days may need.

    They are the latest `max_length` of those that have `entered`, and all that will.
    """
    before = _counts_before(qualifies & entered)
    starts = timeline.user_starts
    is_last = np.ones(len(starts), np.bool_)
    is_last[:-1] = starts[1:] != starts[:-1]
    last_rows = np.flatnonzero(is_last)
    user_of_row: Int64Array = np.cumsum(is_last) - is_last
    user_ends = before[last_rows + 1][user_of_row]
    is_late = user_ends - before[1:] < max_length
    return np.asarray(qualifies & (is_late | ~np.asarray(entered)))


def ragged_positions(starts: Int64Array, lengths: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Positions of many spans, one after the other, and their offsets (one more than spans)."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return positions, offsets


def _counts_before(flags: BoolArray) -> Int64Array:
    counts = np.zeros(len(flags) + 1, np.int64)
    np.cumsum(flags, out=counts[1:])
    return counts


def normal_lists(lists: pa.ListArray) -> pa.ListArray:
    """The same lists with offsets that start at 0 (batches of a file are slices); null is empty."""
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum(lists.value_lengths().fill_null(0).to_numpy(), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), lists.flatten())
