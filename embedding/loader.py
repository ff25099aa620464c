"""Parquet sample files -> `RankingBatch`es of one rank, decoded ahead in background threads."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from embedding import samples
from embedding.arrow import Rows, SampleColumns, concat_rows
from embedding.batch import RankingBatch
from embedding.epochs import EpochPlan, Position, Segment, num_rows, num_steps, rows_left, split
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.items import ItemSource
from embedding.prefetch import Prefetched
from embedding.raw_ids import id_lists


@dataclass(frozen=True)
class RowGroup:
    """One row group of a Parquet file."""

    path: Path
    index: int
    num_rows: int


@dataclass
class LoaderStats:
    """What a stream of batches has cost so far."""

    rows: int = 0
    """Real rows handed out."""
    wait_s: float = 0.0
    """Seconds the consumer waited for a batch."""


class SampleFiles:
    """The row groups of a list of sample files, their schemas checked."""

    def __init__(
        self,
        paths: Sequence[Path],
        schema: FeatureSchema,
        tasks: Sequence[str],
        *,
        items: ItemSource | None = None,
    ) -> None:
        """Read the footers of `paths`; with `items`, batches say which items they show.

        Raises:
            UserError: a file is missing or damaged, lacks a column or has one of a wrong type.
        """
        with ThreadPoolExecutor(max_workers=8) as pool:
            footers = list(pool.map(_read_footer, paths))
        lists = [list_columns(footer.schema.to_arrow_schema(), schema) for footer in footers]
        # A log may turn to lists one day: single ids of the days before are lists of one.
        lists_somewhere = frozenset().union(*lists)
        # A file that lacks what another one has is refused below.
        weights = {samples.weight_column(task) for task in tasks}
        weights &= {name for footer in footers for name in footer.schema.to_arrow_schema().names}
        self.columns = SampleColumns(
            schema, tasks, list_columns=lists_somewhere, weights=frozenset(weights), items=items
        )
        for path, footer in zip(paths, footers, strict=True):
            _check_types(path, footer.schema.to_arrow_schema(), self.columns)
        self.row_groups = [
            RowGroup(path, index, footer.row_group(index).num_rows)
            for path, footer in zip(paths, footers, strict=True)
            for index in range(footer.num_row_groups)
        ]

    @property
    def rows_per_group(self) -> list[int]:
        """Rows of every row group, in the order of the files."""
        return [group.num_rows for group in self.row_groups]

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(self.rows_per_group)

    def decode(self, plan: EpochPlan, segment: Segment) -> "Decoded":
        """The row groups of a segment's chunk, decoded.

        Raises:
            UserError: a file is damaged.
        """
        groups = [self.row_groups[group] for group in plan.chunks[segment.chunk]]
        tables = [
            _with_lists(_read_row_group(group, self.columns.names), self.columns.list_columns)
            for group in groups
        ]
        return Decoded(pa.concat_tables(tables), plan, segment)

    def rows(self, decoded: "Decoded") -> Rows:
        """The rows of a decoded segment, in training order.

        Raises:
            UserError: a column holds nulls where it must not.
        """
        order = torch.from_numpy(decoded.plan.order(decoded.segment))
        try:
            return self.columns.rows(decoded.table, order)
        except UserError as error:
            groups = decoded.plan.chunks[decoded.segment.chunk]
            paths = sorted({str(self.row_groups[group].path) for group in groups})
            raise UserError(f"{', '.join(paths)}: {error}") from error


@dataclass(frozen=True)
class Decoded:
    """A decoded chunk, and which of its rows to use."""

    table: pa.Table
    plan: EpochPlan
    segment: Segment


class SampleLoader:
    """Batches of one rank. All ranks make the same number of steps."""

    def __init__(
        self,
        files: SampleFiles,
        *,
        batch_size_per_rank: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """`pin_memory`: batches lie in page-locked memory, from which copies to a GPU overlap."""
        if files.num_rows == 0:
            raise UserError(
                f"the {len(files.row_groups)} row groups of the sample files hold no row; check "
                "the window of days and what ingest put aside"
            )
        self.files = files
        self.batch_size_per_rank = batch_size_per_rank
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.pin_memory = pin_memory

    def num_steps(self, position: Position) -> int:
        """Steps from `position` to the end of its epoch."""
        left = rows_left(self.files.num_rows, position.legs)
        return num_steps(left, self.world_size, self.batch_size_per_rank)

    def rows_before(self, position: Position) -> int:
        """Rows trained from the start of the run to `position`, over all ranks."""
        left = rows_left(self.files.num_rows, position.legs)
        return (position.epoch + 1) * self.files.num_rows - left

    def shuffled(self, position: Position) -> "BatchStream":
        """The batches from `position` to the end of its epoch."""
        plan = self._plan(position)
        return self._stream(plan, plan.remaining(position.legs))

    def sequential(self) -> "BatchStream":
        """All rows once, in the order of the files."""
        plan = EpochPlan.sequential(self.files.rows_per_group)
        return self._stream(plan, plan.remaining(()))

    def _plan(self, position: Position) -> EpochPlan:
        return EpochPlan.shuffled(self.files.rows_per_group, seed=self.seed, epoch=position.epoch)

    def _stream(self, plan: EpochPlan, segments: tuple[Segment, ...]) -> "BatchStream":
        share = split(segments, self.world_size)[self.rank]
        steps = num_steps(num_rows(segments), self.world_size, self.batch_size_per_rank)
        # A rank without rows of its own still steps with the others: on one row of weight 0.
        spare = tuple(Segment(s.chunk, s.start, s.start + 1) for s in (*share, *segments)[:1])
        return BatchStream(
            self.files,
            plan,
            _Share(share, spare, steps),
            batch_size=self.batch_size_per_rank,
            pin_memory=self.pin_memory,
        )


@dataclass(frozen=True)
class _Share:
    """What one rank does in a pass."""

    segments: tuple[Segment, ...]
    spare: tuple[Segment, ...]
    """One row, for steps the rank has no rows for."""
    num_steps: int


class BatchStream:
    """The batches of one rank for one pass; an iterator and a context manager.

    One thread decodes the next chunk while another hashes, orders and cuts the present one.
    """

    def __init__(
        self,
        files: SampleFiles,
        plan: EpochPlan,
        share: "_Share",
        *,
        batch_size: int,
        pin_memory: bool = False,
    ) -> None:
        self.num_steps = share.num_steps
        self.batch_size = batch_size
        self._pin_memory = pin_memory
        self._files = files
        self._plan = plan
        self._share = share
        self._rows = 0
        self._decoded = Prefetched(self._decode, depth=1)
        self._batches = Prefetched(self._finished_batches, depth=8)

    @property
    def stats(self) -> LoaderStats:
        """Rows handed out and seconds waited for them so far."""
        return LoaderStats(self._rows, self._batches.wait_s)

    def __iter__(self) -> Iterator[RankingBatch]:
        return self

    def __next__(self) -> RankingBatch:
        batch = next(self._batches)
        self._rows += batch.num_rows
        return batch

    def close(self) -> None:
        """Stop the threads."""
        self._batches.stop()
        self._decoded.close()
        self._batches.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _decode(self) -> Iterator[Decoded]:
        return (self._files.decode(self._plan, segment) for segment in self._share.segments)

    def _finished_batches(self) -> Iterator[RankingBatch]:
        batches = self._cut_batches()
        return (batch.pin_memory() for batch in batches) if self._pin_memory else batches

    def _cut_batches(self) -> Iterator[RankingBatch]:
        made = 0
        for rows in _cut(map(self._files.rows, self._decoded), self.batch_size):
            yield rows.to_batch(self.batch_size)
            made += 1
        for segment in self._share.spare * (self.num_steps - made):
            spare = self._files.rows(self._files.decode(self._plan, segment))
            yield spare.to_batch(self.batch_size, num_real_rows=0)


def _cut(chunks: Iterator[Rows], batch_size: int) -> Iterator[Rows]:
    """Chunks of any size -> batches; only the last one may be short."""
    pending: list[Rows] = []
    num_pending = 0
    for chunk in chunks:
        start = 0
        while num_pending + chunk.num_rows - start >= batch_size:
            stop = start + batch_size - num_pending
            yield concat_rows([*pending, chunk.cut(start, stop)])
            pending, num_pending, start = [], 0, stop
        if start < chunk.num_rows:
            pending.append(chunk.cut(start, chunk.num_rows))
            num_pending += chunk.num_rows - start
    if pending:
        yield concat_rows(pending)


def _read_footer(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        if _may_pass(error):
            raise
        raise _unreadable(path, error) from error


def _read_row_group(group: RowGroup, columns: list[str]) -> pa.Table:
    try:
        with pq.ParquetFile(group.path) as file:
            return file.read_row_group(group.index, columns=columns, use_threads=True)
    except (pa.ArrowException, OSError) as error:
        if _may_pass(error):
            raise
        raise _unreadable(group.path, error) from error


def _with_lists(table: pa.Table, names: frozenset[str]) -> pa.Table:
    """The table with lists in these columns."""
    for name in names:
        column = table[name]
        if not _is_list(column.type):
            lists = pa.chunked_array(
                [id_lists(chunk) for chunk in column.chunks], pa.list_(pa.int64())
            )
            table = table.set_column(table.column_names.index(name), name, lists)
    return table


def _may_pass(error: Exception) -> bool:
    """Whether the system failed to read, so that a restart may succeed.

    Pyarrow raises OSError for damage, too, but only the system's errors have a number.
    """
    lasting = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, lasting)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]}); the file is missing, "
        "truncated or damaged: restore it, or run the stage that writes it again"
    )


def list_columns(arrow: pa.Schema, schema: FeatureSchema) -> frozenset[str]:
    """Columns of sparse and sequence features that hold lists in samples of an Arrow schema."""
    columns = [samples.sparse_column(f.name) for f in schema.sparse]
    columns += [samples.sequence_column(f.name) for f in schema.sequences]
    return frozenset(
        name for name in columns if name in arrow.names and _is_list(arrow.field(name).type)
    )


def _is_list(arrow_type: pa.DataType) -> bool:
    return bool(pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type))


def _check_types(path: Path, arrow: pa.Schema, columns: SampleColumns) -> None:
    floats = {*columns.labels, *columns.weights.values(), *columns.dense}
    for name in columns.names:
        if name not in arrow.names:
            raise UserError(
                f"{path}: column {name!r} is missing; the samples were written for another feature "
                "schema: run the join stage again"
            )
        found = arrow.field(name).type
        wanted = pa.float32() if name in floats else pa.int64()
        is_list = name in columns.list_columns and _is_list(found)
        inner = found.value_type if is_list else found
        if inner != wanted or (name.startswith("sequence:") and not is_list):
            what = f"list<{wanted}>" if name.startswith("sequence:") else str(wanted)
            raise UserError(
                f"{path}: column {name!r} has type {found} but must be {what}; run the join stage "
                "again"
            )
