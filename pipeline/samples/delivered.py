"""Histories that the log delivers: list columns of each event, instead of events that were seen.

A service that ranked with the user's latest items can log what it read, so that training sees
exactly that. Ingest checks these lists and keeps the latest events of each under the names of
computed ones (`buckets.history_column`): whoever reads histories knows no difference.
"""

# Shapes: R rows, N events of all lists of a history.

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedding.raw_ids import Int64Array, is_id_list_type, to_raw_ids
from pipeline.samples.columns import DeliveredHistory, EventColumns, history_column
from pipeline.samples.histories import BoolArray, normal_lists, ragged_positions


def list_type_faults(schema: pa.Schema, columns: EventColumns) -> Iterator[tuple[str, str]]:
    """Columns of delivered histories whose type cannot hold one, and what it must be."""
    for history in columns.delivered.values():
        for attribute, name in history.columns.items():
            if schema.names.count(name) != 1:
                continue
            kind = schema.field(name).type
            if attribute != "timestamp" and not is_id_list_type(kind):
                yield name, "a list of integers or strings"
            elif attribute == "timestamp" and not _is_timestamps(kind):
                yield name, "a list of Arrow timestamps"


def _is_timestamps(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return is_list and pa.types.is_timestamp(kind.value_type)


def delivered_histories(table: pa.Table, columns: EventColumns) -> dict[str, pa.ListArray]:
    """Lists of all delivered histories: raw ids, and times in milliseconds; null is empty."""
    found = {}
    for name, history in columns.delivered.items():
        for attribute, column in history.columns.items():
            lists = table[column].combine_chunks()
            if attribute == "timestamp":
                lists = normal_lists(lists)
                times = lists.values.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
                lists = pa.ListArray.from_arrays(lists.offsets, times)
            else:
                lists = normal_lists(to_raw_ids(lists))
            found[history_column(name, attribute)] = lists
    return found


def delivered_faults(events: pa.Table, columns: EventColumns) -> Iterator[tuple[str, BoolArray]]:
    """Rows (R) that break what is asked of a delivered history, with the reason."""
    times_R = events["timestamp"].fill_null(0).to_numpy()
    for name, history in columns.delivered.items():
        lists = {a: _lists(events, name, a) for a in history.columns}
        lengths = [np.diff(column.offsets.to_numpy()) for column in lists.values()]
        differ_R = np.any([other != lengths[0] for other in lengths[1:]], axis=0)
        yield (
            f"lists of history {name} of different lengths",
            np.broadcast_to(differ_R, times_R.shape),
        )
        null_R = np.zeros(len(times_R), np.bool_)
        for column in lists.values():
            null_R |= _any(pc.is_null(column.values).to_numpy(zero_copy_only=False), column)
        yield f"null in a list of history {name}", null_R
        if "timestamp" in lists:
            column = lists["timestamp"]
            own_N = np.repeat(times_R, np.diff(column.offsets.to_numpy()))
            past_N = column.values.fill_null(0).to_numpy()
            yield (
                f"history {name} holds an event that is not earlier",
                _any(past_N >= own_N, column),
            )


def _any(flags_N: BoolArray, lists: pa.ListArray) -> BoolArray:
    """True for rows (R) any of whose elements has the flag."""
    before = np.concatenate([[0], np.cumsum(flags_N)])
    return np.asarray(np.diff(before[lists.offsets.to_numpy()]) > 0)


def latest(events: pa.Table, columns: EventColumns) -> pa.Table:
    """The same events with the last `max_length` elements of every delivered list."""
    for name, history in columns.delivered.items():
        for attribute in history.columns:
            column = history_column(name, attribute)
            lists = _cut(_lists(events, name, attribute), history)
            events = events.set_column(events.column_names.index(column), column, lists)
    return events


def _cut(lists: pa.ListArray, history: DeliveredHistory) -> pa.ListArray:
    offsets = lists.offsets.to_numpy().astype(np.int64)
    lengths = np.minimum(np.diff(offsets), history.max_length)
    positions, ends = ragged_positions(offsets[1:] - lengths, lengths)
    values: Int64Array = lists.values.to_numpy()[positions]
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(values))


def _lists(events: pa.Table, history: str, attribute: str) -> pa.ListArray:
    return normal_lists(events[history_column(history, attribute)].combine_chunks())
