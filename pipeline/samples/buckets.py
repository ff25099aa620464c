"""The second pass of ingest: histories of one bucket of users.

Reads the bucket's rows of every chunk and of the earlier state; writes its events of every day,
with their histories as list columns, its state for the next span, and its event counts.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding.feature_schema import HistoryConfig
from embedding.raw_ids import Int64Array, ids_or_missing, mix64
from pipeline.samples.columns import KEY_COLUMNS, EventColumns, history_column
from pipeline.samples.contract import MS_PER_DAY, epoch_day, open_parquet
from pipeline.samples.histories import (
    BoolArray,
    HistorySpans,
    UserTimeline,
    history_spans,
    retained,
)
from pipeline.samples.partition import label_counts, read_bucket, user_buckets

ROWS_PER_GROUP = 65_536
ROWS_PER_MERGE = 1 << 20
REPEATED = "repeats an earlier event"
"""Reason of quarantined rows whose four keys an earlier row of the log has."""
_IS_NEW = "new"


@dataclass(frozen=True)
class EarlierState:
    """User state of the artifact that this span continues."""

    directory: Path
    num_buckets: int

    def count_rows(self) -> int:
        """Events that it keeps of all users."""
        files = (self.directory / bucket_file(bucket) for bucket in range(self.num_buckets))
        return sum(pq.read_metadata(file).num_rows for file in files)


@dataclass(frozen=True)
class BucketPlan:
    """What every bucket task needs to know."""

    columns: EventColumns
    histories: tuple[HistoryConfig, ...]
    """Those to compute."""
    days: tuple[str, ...]
    num_buckets: int
    parts: Path
    output: Path
    earlier: EarlierState | None


@dataclass(frozen=True)
class BucketFacts:
    """What one bucket holds."""

    bucket: int
    rows_per_day: dict[str, int]
    history_events: dict[str, int]
    """By history: past events over all rows; divided by rows it is the mean length."""
    repeats: int
    """New events that were put aside, as an earlier row of the log is the same event."""
    repeated_labels: dict[str, tuple[int, int]]
    """Of these, by label column: observed and positive rows."""
    repeats_of_days: dict[str, tuple[int, str]]
    """Of these, by day if there are any: how many, and one of them, described."""

    @property
    def num_rows(self) -> int:
        """New events of the bucket."""
        return sum(self.rows_per_day.values())


def bucket_file(bucket: int) -> str:
    """File name of a bucket."""
    return f"bucket-{bucket:04d}.parquet"


def build_bucket(bucket: int, plan: BucketPlan) -> BucketFacts:
    """Sort a bucket by user and time, find the histories, write events, state and counts."""
    table = _load(bucket, plan)
    is_repeat = repeats(table)
    repeated = table.filter(pa.array(is_repeat))
    if repeated.num_rows:
        _write_repeats(bucket, repeated, plan)
        table = table.filter(pa.array(~is_repeat)).combine_chunks()
    users, times = table["user_id"].to_numpy(), table["timestamp"].to_numpy()
    timeline = UserTimeline.of(users, times)
    is_new = np.asarray(table[_IS_NEW].to_numpy())
    spans: dict[str, HistorySpans] = {}
    state = {}
    next_day = (epoch_day(plan.days[-1]) + 1) * MS_PER_DAY
    for history in plan.histories:
        qualifies = np.asarray(table[_qualifies(history.name)].to_numpy())
        delay = 1000 * history.delay_s
        spans[history.name] = history_spans(timeline, qualifies, history.max_length, delay)
        entered = times < next_day - delay
        state[history.name] = retained(timeline, qualifies, history.max_length, entered)
    _write_state(bucket, table, state, plan)
    _write_counts(bucket, table.filter(pa.array(is_new)), plan)
    # The sort is stable, so rows of one instant stay in the order of users: reproducible files.
    new_rows = np.flatnonzero(is_new)
    new_rows = new_rows[np.argsort(times[new_rows], kind="stable")]
    rows_per_day = _write_days(bucket, table, new_rows, spans, plan)
    lengths = {name: int(span.lengths[new_rows].sum()) for name, span in spans.items()}
    for name in plan.columns.logged:
        lists = table[history_column(name, "item_id")]
        lengths[name] = pc.sum(pc.list_value_length(lists)).as_py() or 0
    return BucketFacts(
        bucket,
        rows_per_day,
        lengths,
        repeats=repeated.num_rows,
        repeated_labels={name: label_counts(repeated[name]) for name in plan.columns.labels},
        repeats_of_days=_repeats_of_days(repeated, plan.days),
    )


def repeats(table: pa.Table) -> BoolArray:
    """True for new rows whose keys an earlier new row has, too: the same event, delivered twice.

    Args:
        table: rows by user and time, in the order of the log where these are equal.
    """
    users, times = table["user_id"].to_numpy(), table["timestamp"].to_numpy()
    starts = UserTimeline.of(users, times).tie_starts
    tied = starts != np.arange(len(starts))
    tied[starts[tied]] = True
    rows = np.flatnonzero(tied & table[_IS_NEW].to_numpy())
    some = table.select(["request_id", "item_id"]).take(rows)
    requests, items = some["request_id"].to_numpy(), some["item_id"].to_numpy()
    found = np.zeros(table.num_rows, np.bool_)
    # Sorting one hash is a fraction of sorting three keys, and most buckets hold no repeat.
    hashes = np.sort(
        mix64(mix64(mix64(requests).view(np.int64) + items).view(np.int64) + starts[rows])
    )
    if not (hashes[1:] == hashes[:-1]).any():
        return found
    order = np.lexsort((items, requests, starts[rows]))  # stable: the first of the log stays first
    keys = [values[order] for values in (starts[rows], requests, items)]
    same = np.logical_and.reduce([key[1:] == key[:-1] for key in keys])
    found[rows[order[1:][same]]] = True
    return found


def _qualifies(history: str) -> str:
    return f"in:{history}"


def _repeats_of_days(repeated: pa.Table, days: Sequence[str]) -> dict[str, tuple[int, str]]:
    found = {}
    epoch_days = repeated["timestamp"].to_numpy() // MS_PER_DAY
    for day in days if repeated.num_rows else ():
        rows = np.flatnonzero(epoch_days == epoch_day(day))
        if len(rows):
            first = repeated.slice(rows[0], 1).to_pylist()[0]
            keys = (f"{name} {first[name]}" for name in (*KEY_COLUMNS, "timestamp"))
            found[day] = (len(rows), ", ".join(keys))
    return found


def _write_repeats(bucket: int, repeated: pa.Table, plan: BucketPlan) -> None:
    """As the pipeline works on them: ids raw, timestamps in milliseconds."""
    inner = [_IS_NEW, *(_qualifies(history.name) for history in plan.histories)]
    rows = repeated.drop_columns(inner).append_column(
        "reason", pa.array([REPEATED] * repeated.num_rows)
    )
    pq.write_table(rows, plan.output / "quarantine" / f"repeats-{bucket_file(bucket)}")


def _state_columns(plan: BucketPlan) -> list[str]:
    values = [name for names in plan.columns.history_values.values() for name in names]
    flags = [_qualifies(history.name) for history in plan.histories]
    return list(dict.fromkeys(["user_id", "item_id", "timestamp", *values, *flags]))


def _load(bucket: int, plan: BucketPlan) -> pa.Table:
    batches = [read_bucket(path, bucket) for path in sorted(plan.parts.glob("*.arrow"))]
    table = pa.Table.from_batches(batches)
    for history in plan.histories:
        enters = pa.array(np.ones(table.num_rows, np.bool_))
        if history.label is not None:
            enters = pc.fill_null(pc.equal(table[history.label], 1), False)
        table = table.append_column(_qualifies(history.name), enters)
    table = table.append_column(_IS_NEW, pa.array(np.ones(table.num_rows, np.bool_)))
    earlier = list(_earlier_rows(bucket, plan))
    # Earlier rows come first, so that equal timestamps keep the order of the log.
    table = pa.concat_tables([*earlier, table], promote_options="default")
    is_new = pc.fill_null(table[_IS_NEW], False)
    table = table.set_column(table.column_names.index(_IS_NEW), _IS_NEW, is_new)
    order = np.lexsort((table["timestamp"].to_numpy(), table["user_id"].to_numpy()))
    return table.take(order).combine_chunks()


def _earlier_rows(bucket: int, plan: BucketPlan) -> Iterator[pa.Table]:
    """Earlier state of this bucket's users, whatever the number of buckets was then."""
    if plan.earlier is None:
        return
    # bucket = h mod n and other = h mod m hold for one h only if they agree modulo gcd(n, m).
    step = gcd(plan.num_buckets, plan.earlier.num_buckets)
    for other in range(bucket % step, plan.earlier.num_buckets, step):
        with open_parquet(plan.earlier.directory / bucket_file(other)) as file:
            state = file.read(use_threads=False)
        mine = user_buckets(state["user_id"].to_numpy(), plan.num_buckets) == bucket
        yield state.filter(pa.array(mine))


def _write_state(
    bucket: int, table: pa.Table, state: dict[str, np.ndarray], plan: BucketPlan
) -> None:
    keep = np.zeros(table.num_rows, np.bool_)
    for history, rows in state.items():
        name = _qualifies(history)
        table = table.set_column(table.column_names.index(name), name, pa.array(rows))
        keep |= rows
    kept = table.select(_state_columns(plan)).filter(pa.array(keep))
    pq.write_table(kept, plan.output / "state" / bucket_file(bucket), compression="zstd")


def _write_counts(bucket: int, events: pa.Table, plan: BucketPlan) -> None:
    """Events, positives (of any task) and first day of every item and user of the bucket."""
    positive = np.zeros(events.num_rows, np.bool_)
    for label in plan.columns.labels:
        positive |= pc.fill_null(pc.equal(events[label], 1), False).to_numpy()
    day = events["timestamp"].to_numpy() // MS_PER_DAY
    counted = pa.table(
        {
            "item_id": events["item_id"],
            "user_id": events["user_id"],
            "events": pa.array(np.ones(events.num_rows, np.int64)),
            "positives": pa.array(positive.astype(np.int64)),
            "first_day": pa.array(day.astype(np.int32)).cast(pa.date32()),
        }
    )
    for key in ("item_id", "user_id"):
        other = "user_id" if key == "item_id" else "item_id"
        counts = merge_counts([counted.drop_columns(other)], key)
        pq.write_table(counts, plan.parts / f"{key}-{bucket_file(bucket)}")


def merge_counts(tables: Iterable[pa.Table], key: str) -> pa.Table:
    """Add up counts by `key`; sorted by it.

    Memory holds a few times the result: popular items are in the counts of every bucket.
    """
    pending: list[pa.Table] = []
    num_merged = 0
    for table in tables:
        pending.append(table)
        if sum(part.num_rows for part in pending) > 2 * num_merged + ROWS_PER_MERGE:
            pending = [_added_up(pending, key)]
            num_merged = pending[0].num_rows
    return _added_up(pending, key).sort_by(key)


def _added_up(tables: list[pa.Table], key: str) -> pa.Table:
    return (
        pa.concat_tables(tables)
        .group_by(key, use_threads=False)
        .aggregate([("events", "sum"), ("positives", "sum"), ("first_day", "min")])
        .select([key, "events_sum", "positives_sum", "first_day_min"])
        .rename_columns([key, "events", "positives", "first_day"])
    )


def _write_days(
    bucket: int,
    table: pa.Table,
    new_rows: Int64Array,
    spans: dict[str, HistorySpans],
    plan: BucketPlan,
) -> dict[str, int]:
    days = table["timestamp"].to_numpy()[new_rows] // MS_PER_DAY
    events = table.drop_columns([_IS_NEW, *(_qualifies(h.name) for h in plan.histories)])
    sources = {"item_id": events["item_id"], "timestamp": events["timestamp"]}
    sources |= {c: events[c] for names in plan.columns.history_values.values() for c in names}
    flat = {name: ids_or_missing(column.combine_chunks()) for name, column in sources.items()}
    rows_per_day = {}
    for day in plan.days:
        start, end = np.searchsorted(days, [epoch_day(day), epoch_day(day) + 1])
        rows_per_day[day] = int(end - start)
        if start == end:
            continue
        path = plan.output / "events" / f"dt={day}" / bucket_file(bucket)
        writer = None
        for first in range(start, end, ROWS_PER_GROUP):
            rows = new_rows[first : min(first + ROWS_PER_GROUP, end)]
            group = _with_histories(events.take(rows), rows, spans, flat, plan)
            writer = writer or pq.ParquetWriter(path, group.schema, compression="zstd")
            writer.write_table(group, row_group_size=ROWS_PER_GROUP)
        assert writer is not None
        writer.close()
    return rows_per_day


def _with_histories(
    events: pa.Table,
    rows: Int64Array,
    spans: dict[str, HistorySpans],
    flat: dict[str, Int64Array],
    plan: BucketPlan,
) -> pa.Table:
    for history, span in spans.items():
        offsets, past = span.gather(rows)
        list_offsets = pa.array(offsets.astype(np.int32))
        for column in plan.columns.history_columns[history]:
            lists = pa.ListArray.from_arrays(list_offsets, pa.array(flat[column][past]))
            events = events.append_column(history_column(history, column), lists)
    return events
