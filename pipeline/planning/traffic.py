"""`braid traffic`: how often every table row is looked up, from the samples that join wrote.

Reads samples/dt=*/*.parquet of the join artifacts of an output directory. Needs an initialised Ray;
one task counts the lookups of one file.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedding import samples
from embedding.config import ManagedCollision, TableConfig
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema, SequenceFeature, SparseFeature
from embedding.planning.id_distribution import from_counts
from embedding.planning.traffic import MIN_GROWTH_DAYS, TableTraffic, Traffic
from pipeline.tasks import stream_tasks

_MERGE_AT = 8
"""Parts of a table's counts that are kept before they are added up."""


@dataclass(frozen=True)
class FileCounts:
    """Lookups in one sample file."""

    day: str
    rows: int
    ids: dict[str, int]
    """By feature."""
    tables: dict[str, tuple[np.ndarray, np.ndarray]]
    """Rows and how often they were looked up, by table."""


class RowCounts:
    """Lookups of the rows of one table, added up file by file."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, rows: np.ndarray, counts: np.ndarray) -> None:
        """More lookups; `rows` are distinct."""
        self._parts.append((rows, counts))
        if len(self._parts) > _MERGE_AT:
            self._parts = [self.total()]

    def total(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct rows, ascending, and their lookups."""
        if not self._parts:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        rows = np.concatenate([rows for rows, _ in self._parts])
        distinct, inverse = np.unique(rows, return_inverse=True)
        counts = np.bincount(
            inverse, weights=np.concatenate([counts for _, counts in self._parts]).astype(float)
        )
        return distinct, counts.astype(np.int64)


def sample_files(out: Path, last_day: str | None) -> list[Path]:
    """Sample files of all joined days up to `last_day`, in the order of days.

    A day that several runs have joined counts as the latest of them did.

    Raises:
        UserError: There are none.
    """
    found = {
        folder.name: sorted(folder.glob("*.parquet"))
        for folder in sorted(out.glob("????-??-??/join/samples/dt=*"))
        if last_day is None or folder.name <= f"dt={last_day}"
    }
    found = {day: files for day, files in found.items() if files}
    if not found:
        until = f" up to {last_day}" if last_day else ""
        raise UserError(
            f"--out {out} has no joined samples{until}; name the output directory of a run, or run "
            f"`braid stage join --recipe NAME --date {last_day or 'YYYY-MM-DD'} --out {out}` first"
        )
    return [path for day in sorted(found) for path in found[day]]


def measure_traffic(
    schema: FeatureSchema,
    files: Sequence[Path],
    progress: Callable[[int, int], None] | None = None,
) -> Traffic:
    """Lookups of all tables in these files.

    Raises:
        UserError: A file lacks a feature of the schema.
    """
    file_rows = [pq.read_metadata(path).num_rows for path in files]
    days = sorted({_day(path) for path in files})
    earlier = {table.name: RowCounts() for table in schema.tables}
    latest = {table.name: RowCounts() for table in schema.tables}
    rows, ids = 0, dict.fromkeys((f.name for f in schema.id_features), 0)
    for counted in stream_tasks(count_file, files, schema, file_rows):
        rows += counted.rows
        for name, number in counted.ids.items():
            ids[name] += number
        target = latest if counted.day == days[-1] else earlier
        for table, part in counted.tables.items():
            target[table].add(*part)
        if progress:
            progress(rows, sum(file_rows))
    shows_growth = len(days) >= MIN_GROWTH_DAYS
    return Traffic(
        rows=rows,
        days=len(days),
        rows_per_day=rows / len(days),
        ids_per_sample={name: number / max(rows, 1) for name, number in ids.items()},
        tables=tuple(
            table_traffic(table, earlier[table.name], latest[table.name], shows_growth=shows_growth)
            for table in schema.tables
        ),
    )


def table_traffic(
    table: TableConfig, earlier: RowCounts, latest: RowCounts, *, shows_growth: bool
) -> TableTraffic:
    """Statistics of a table.

    Args:
        table: the table.
        earlier: lookups before the last day.
        latest: lookups of the last day.
        shows_growth: whether there are days enough to call rows new.
    """
    known, known_counts = earlier.total()
    now, now_counts = latest.total()
    both = RowCounts()
    both.add(known, known_counts)
    both.add(now, now_counts)
    rows, counts = both.total()
    distribution = from_counts(counts)
    new = len(np.setdiff1d(now, known, assume_unique=True))
    placed = len(rows) and not isinstance(table.ids, ManagedCollision)
    return TableTraffic(
        table=table.name,
        num_rows=table.num_embeddings,
        lookups=int(counts.sum()),
        rows_touched=len(counts),
        rows_seen_once=int((counts == 1).sum()),
        highest_row=int(rows[-1]) if placed else None,
        bin_rows=distribution.num_rows,
        bin_shares=distribution.mass,
        new_rows_per_day=float(new) if shows_growth else None,
    )


def count_file(path: Path, schema: FeatureSchema) -> FileCounts:
    """Runs in a Ray task: lookups of one sample file."""
    import torch

    from embedding.hashing import rows_of

    columns = {feature.name: _column(feature) for feature in schema.id_features}
    names = pq.read_schema(path).names
    missing = [column for column in columns.values() if column not in names]
    if missing:
        raise UserError(f"{path} lacks the columns {missing}; join it again with this recipe")
    table = pq.read_table(path, columns=list(columns.values()))
    ids: dict[str, int] = {}
    rows_of_table: dict[str, list[np.ndarray]] = {}
    for feature in schema.id_features:
        raw = _values(table.column(columns[feature.name]))
        ids[feature.name] = len(raw)
        rows = rows_of(torch.from_numpy(raw), schema.table(feature.table)).numpy()
        rows_of_table.setdefault(feature.table, []).append(rows)
    counted = {
        name: np.unique(np.concatenate(parts), return_counts=True)
        for name, parts in rows_of_table.items()
    }
    return FileCounts(_day(path), table.num_rows, ids, counted)


def _values(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    else:
        parts = [chunk.to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def _column(feature: SparseFeature | SequenceFeature) -> str:
    if isinstance(feature, SequenceFeature):
        return samples.sequence_column(feature.name)
    return samples.sparse_column(feature.name)


def _day(path: Path) -> str:
    return path.parent.name.removeprefix("dt=")
