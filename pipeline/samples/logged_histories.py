"""Histories that the log delivers: list columns of each event, instead of events that were seen.

A service that ranked with the user's latest items can log what it read, so that training sees
exactly that. Ingest checks these lists and keeps the latest events of each under the names of
computed ones (`columns.history_column`): whoever reads histories knows no difference.
"""

# Shapes: R rows, N events of all lists of a history.

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedding.errors import UserError
from embedding.raw_ids import Int64Array, is_id_list_type, to_raw_ids
from pipeline.samples.columns import EventColumns, LoggedHistory, history_column
from pipeline.samples.histories import BoolArray, normal_lists, ragged_positions


def list_type_faults(schema: pa.Schema, columns: EventColumns) -> Iterator[tuple[str, str, str]]:
    """Columns of logged histories whose type cannot hold one, what it must be, and a type."""
    for history in columns.logged.values():
        for attribute, name in history.columns.items():
            if schema.names.count(name) != 1:
                continue
            kind = schema.field(name).type
            if attribute == "timestamp":
                if not _is_timestamps(kind):
                    yield name, "a list of Arrow timestamps", "list<timestamp('ms')>"
            elif not is_id_list_type(kind):
                yield name, "a list of integers or strings", "list<int64>"
            elif attribute == "item_id" and not _are_alike(schema, kind.value_type):
                own = schema.field("item_id").type
                yield name, f"a list of ids like those of item_id ({own})", f"list<{own}>"


def _is_timestamps(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    # A file all of whose lists are empty may have lists of null.
    return is_list and (pa.types.is_timestamp(kind.value_type) or pa.types.is_null(kind.value_type))


def _are_alike(schema: pa.Schema, kind: pa.DataType) -> bool:
    """Whether ids of a type can be those of items: an integer is never a hashed string."""
    if schema.names.count("item_id") != 1 or pa.types.is_null(kind):
        return True
    return pa.types.is_integer(kind) == pa.types.is_integer(schema.field("item_id").type)


def logged_histories(table: pa.Table, columns: EventColumns, path: Path) -> dict[str, pa.ListArray]:
    """Lists of all logged histories: raw ids, and times in milliseconds; null is empty.

    Raises:
        UserError: a column of the file `path` holds lists that cannot be converted.
    """
    found = {}
    for name, history in columns.logged.items():
        for attribute, column in history.columns.items():
            try:
                found[history_column(name, attribute)] = _converted(table[column], attribute)
            except pa.ArrowException as error:
                raise UserError(
                    f"{path}: column {column!r} cannot be read ({error}); correct it"
                ) from error
    return found


def _converted(column: pa.ChunkedArray, attribute: str) -> pa.ListArray:
    lists = column.combine_chunks()
    if attribute != "timestamp":
        return normal_lists(to_raw_ids(lists))
    lists = normal_lists(lists)
    times = lists.values.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
    return pa.ListArray.from_arrays(lists.offsets, times)


def logged_faults(events: pa.Table, columns: EventColumns) -> Iterator[tuple[str, BoolArray]]:
    """Rows (R) that break what is asked of a logged history, with the reason."""
    times_R = events["timestamp"].fill_null(0).to_numpy()
    for name, history in columns.logged.items():
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
            row_N = np.repeat(np.arange(len(times_R)), np.diff(column.offsets.to_numpy()))
            past_N = column.values.fill_null(0).to_numpy()
            late_N = past_N >= times_R[row_N]
            yield f"history {name} holds an event that is not earlier", _any(late_N, column)
            falls_N = np.zeros(len(past_N), np.bool_)
            falls_N[1:] = (np.diff(past_N) < 0) & (np.diff(row_N) == 0)
            yield f"history {name} is not ordered by time, oldest first", _any(falls_N, column)


def _any(flags_N: BoolArray, lists: pa.ListArray) -> BoolArray:
    """True for rows (R) any of whose elements has the flag."""
    before = np.concatenate([[0], np.cumsum(flags_N)])
    return np.asarray(np.diff(before[lists.offsets.to_numpy()]) > 0)


def latest(events: pa.Table, columns: EventColumns) -> pa.Table:
    """The same events with the last `max_length` elements of every logged list."""
    for name, history in columns.logged.items():
        for attribute in history.columns:
            column = history_column(name, attribute)
            lists = _cut(_lists(events, name, attribute), history)
            events = events.set_column(events.column_names.index(column), column, lists)
    return events


def _cut(lists: pa.ListArray, history: LoggedHistory) -> pa.ListArray:
    offsets = lists.offsets.to_numpy().astype(np.int64)
    lengths = np.minimum(np.diff(offsets), history.max_length)
    positions, ends = ragged_positions(offsets[1:] - lengths, lengths)
    values: Int64Array = lists.values.to_numpy()[positions]
    return pa.ListArray.from_arrays(pa.array(ends.astype(np.int32)), pa.array(values))


def _lists(events: pa.Table, history: str, attribute: str) -> pa.ListArray:
    return normal_lists(events[history_column(history, attribute)].combine_chunks())
