"""The first pass of ingest: validate one chunk of an event file and split it by user.

Reads some row groups; writes one Arrow file with one record batch a user bucket, and the rows that
break the contract as one quarantine file.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedding.raw_ids import Int64Array, mix64
from pipeline.samples.columns import EventColumns
from pipeline.samples.contract import (
    CatalogueIds,
    EventFile,
    normalise_events,
    read_columns,
    row_faults,
)
from pipeline.samples.logged_histories import latest

ROWS_PER_CHUNK = 1 << 19


@dataclass(frozen=True)
class Chunk:
    """Some row groups of one file."""

    index: int
    file: EventFile
    row_groups: tuple[int, ...]

    @property
    def name(self) -> str:
        """Sorts like the event log: by day, file and row."""
        return f"chunk-{self.index:06d}"

    @property
    def num_rows(self) -> int:
        """Rows of the chunk."""
        return sum(self.file.row_groups[i] for i in self.row_groups)


@dataclass(frozen=True)
class PartitionPlan:
    """What every partition task needs to know."""

    columns: EventColumns
    known: CatalogueIds
    num_buckets: int
    parts: Path
    quarantine: Path


@dataclass(frozen=True)
class PartitionFacts:
    """What became of one chunk."""

    index: int
    day: str
    rows_in: int
    rows_out: int
    quarantined: dict[str, int]
    example: str | None
    """One quarantined row, described."""
    labels: dict[str, tuple[int, int]]
    """By label column: observed and positive rows."""


def user_buckets(user_ids: Int64Array, num_buckets: int) -> Int64Array:
    """The bucket of each user."""
    return np.asarray((mix64(user_ids) % np.uint64(num_buckets)).astype(np.int64))


def plan_chunks(files: list[EventFile], row_weight: float = 1) -> list[Chunk]:
    """Cut the files into chunks of about `ROWS_PER_CHUNK` rows; a row group is never cut.

    Args:
        files: the event files.
        row_weight: ordinary rows that take the memory of one of these.
    """
    chunks: list[Chunk] = []
    for file in files:
        start, rows = 0, 0
        for group, group_rows in enumerate(file.row_groups):
            if rows and (rows + group_rows) * row_weight > ROWS_PER_CHUNK:
                chunks.append(Chunk(len(chunks), file, tuple(range(start, group))))
                start, rows = group, 0
            rows += group_rows
        if rows:
            chunks.append(Chunk(len(chunks), file, tuple(range(start, len(file.row_groups)))))
    return chunks


def partition_chunk(chunk: Chunk, plan: PartitionPlan) -> PartitionFacts:
    """Validate a chunk and split its sound rows by user.

    Raises:
        UserError: the file is damaged or a column cannot be read.
    """
    columns, path = plan.columns, chunk.file.path
    oracles = [name for name in columns.oracles.values() if name in chunk.file.column_names]
    table = read_columns(path, [*columns.required, *oracles], chunk.row_groups)
    events = normalise_events(table, columns, path)
    fault, reasons = row_faults(table, events, columns, chunk.file.day, plan.known)
    bad = np.flatnonzero(fault >= 0)
    quarantined: dict[str, int] = {}
    example = None
    if len(bad):
        counts = np.bincount(fault[bad], minlength=len(reasons))
        quarantined = {reasons[i]: int(counts[i]) for i in np.flatnonzero(counts)}
        first_row = sum(chunk.file.row_groups[: chunk.row_groups[0]])
        _write_quarantine(
            chunk, table.take(bad), [reasons[i] for i in fault[bad]], first_row + bad, plan
        )
        example = f"{path} row {first_row + bad[0]}: {reasons[fault[bad[0]]]}"
        events = events.filter(pa.array(fault < 0))
    events = latest(events, columns)
    _write_buckets(events, plan.parts / f"{chunk.name}.arrow", plan.num_buckets)
    return PartitionFacts(
        index=chunk.index,
        day=chunk.file.day,
        rows_in=table.num_rows,
        rows_out=events.num_rows,
        quarantined=quarantined,
        example=example,
        labels={name: label_counts(events[name]) for name in columns.labels},
    )


def read_bucket(path: Path, bucket: int) -> pa.RecordBatch:
    """The rows of one bucket in a file that `partition_chunk` wrote."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).get_batch(bucket)


def _write_buckets(events: pa.Table, path: Path, num_buckets: int) -> None:
    bucket = user_buckets(events["user_id"].to_numpy(), num_buckets)
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(num_buckets + 1))
    ordered = events.take(order).combine_chunks()
    batches = ordered.to_batches()
    whole = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=events.schema)
    options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
    with pa.ipc.new_file(str(path), events.schema, options=options) as writer:
        for start, end in zip(ends[:-1], ends[1:], strict=True):
            writer.write_batch(whole.slice(start, end - start))


def _write_quarantine(
    chunk: Chunk, rows: pa.Table, reasons: list[str], row_numbers: Int64Array, plan: PartitionPlan
) -> None:
    rows = rows.append_column("reason", pa.array(reasons))
    source = f"dt={chunk.file.day}/{chunk.file.path.name}"
    rows = rows.append_column("source_file", pa.array([source] * rows.num_rows))
    rows = rows.append_column("source_row", pa.array(row_numbers))
    pq.write_table(rows, plan.quarantine / f"part-{chunk.index:06d}.parquet")


def label_counts(label: pa.ChunkedArray) -> tuple[int, int]:
    """Observed and positive rows of a label column."""
    observed = label.drop_null().to_numpy()
    return len(observed), int((observed == 1).sum())
