"""Arrow tables of samples -> rows in training order -> `RankingBatch`, without per-row Python.

Everything that touches single values happens once a chunk: decoded columns are hashed, and gathered
into their final order. A batch is then a slice of every feature, and its flattening is the
feature-major value array of the KJT:

    raw columns (file order)         rows_FR (training order)        KJT of batch 1
    user  7 9 7 4                    user  r4 r7 | r9 r7
    item  1 2 3 4      hash, gather  item  r4 r1 | r2 r3      ->     r9 r7 r2 r3
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedding import samples
from embedding.arrow_columns import int64, int64_lists, offsets_of, stack_floats, take_segments
from embedding.batch import RankingBatch
from embedding.config import TableConfig
from embedding.feature_schema import FeatureSchema, SequenceFeature, SparseFeature
from embedding.hashing import rows_of
from embedding.items import ItemRows, ItemSource

_ROWS_FOR_THREADS = 8192

# Shapes: R rows of a chunk, B rows of a batch, F features, T tasks, K keys, N jagged values.


@dataclass(frozen=True)
class SingleIds:
    """Features with exactly one id a row."""

    names: tuple[str, ...]
    rows: tuple[Tensor, ...]
    """(R,) a feature. One block for all would be larger than what malloc recycles, and touching
    fresh pages costs more than everything else here."""

    def cut(self, start: int, stop: int) -> "SingleIds":
        """Rows [start, stop)."""
        return replace(self, rows=tuple(rows_R[start:stop] for rows_R in self.rows))

    def to_kjt(self) -> KeyedJaggedTensor:
        """All rows as one KJT."""
        if not self.rows:
            return _empty_kjt()
        num_features, num_rows = len(self.rows), len(self.rows[0])
        lengths, offsets = _one_id_each(num_features * num_rows)
        return KeyedJaggedTensor(
            keys=list(self.names),
            values=torch.cat(self.rows),
            lengths=lengths,
            offsets=offsets,
            stride=num_rows,
            length_per_key=[num_rows] * num_features,
            offset_per_key=[num_rows * i for i in range(num_features + 1)],
        )

    @staticmethod
    def concat(parts: "Sequence[SingleIds]") -> "SingleIds":
        """The rows of all parts, in order."""
        columns = zip(*(part.rows for part in parts), strict=True)
        return SingleIds(parts[0].names, tuple(torch.cat(column) for column in columns))


@dataclass(frozen=True)
class JaggedIds:
    """Features of which at least one has a list of ids a row."""

    names: tuple[str, ...]
    values: tuple[Tensor, ...]
    """(N,) a feature."""
    offsets: tuple[Tensor, ...]
    """(R + 1,) a feature; the first need not be 0."""

    def cut(self, start: int, stop: int) -> "JaggedIds":
        """Rows [start, stop)."""
        return replace(self, offsets=tuple(o[start : stop + 1] for o in self.offsets))

    def to_kjt(self) -> KeyedJaggedTensor:
        """All rows as one KJT."""
        values = [v[int(o[0]) : int(o[-1])] for v, o in zip(self.values, self.offsets, strict=True)]
        length_per_key = [len(v) for v in values]
        return KeyedJaggedTensor(
            keys=list(self.names),
            values=torch.cat(values),
            lengths=torch.cat([o.diff() for o in self.offsets]),
            stride=len(self.offsets[0]) - 1,
            length_per_key=length_per_key,
            offset_per_key=[0, *np.cumsum(length_per_key).tolist()],
        )

    @staticmethod
    def concat(parts: "Sequence[JaggedIds]") -> "JaggedIds":
        """The rows of all parts, in order."""
        values, offsets = [], []
        for feature in range(len(parts[0].names)):
            pieces = [(part.values[feature], part.offsets[feature]) for part in parts]
            values.append(torch.cat([v[int(o[0]) : int(o[-1])] for v, o in pieces]))
            offsets.append(offsets_of(torch.cat([o.diff() for _, o in pieces])))
        return JaggedIds(parts[0].names, tuple(values), tuple(offsets))


Ids = SingleIds | JaggedIds


@dataclass(frozen=True)
class ItemIds:
    """Rows of the content store behind samples: of the candidates, and of every history."""

    candidate_R: Tensor
    histories: JaggedIds

    def cut(self, start: int, stop: int) -> "ItemIds":
        """Rows [start, stop)."""
        return ItemIds(self.candidate_R[start:stop], self.histories.cut(start, stop))

    def to_item_rows(self) -> ItemRows:
        """All rows, each distinct item once."""
        events = zip(self.histories.values, self.histories.offsets, strict=True)
        parts = [(values[int(o[0]) : int(o[-1])], o.diff()) for values, o in events]
        return ItemRows.of(self.candidate_R, dict(zip(self.histories.names, parts, strict=True)))

    @staticmethod
    def concat(parts: "Sequence[ItemIds]") -> "ItemIds":
        """The rows of all parts, in order."""
        return ItemIds(
            torch.cat([part.candidate_R for part in parts]),
            JaggedIds.concat([part.histories for part in parts]),
        )


@dataclass(frozen=True)
class Rows:
    """Rows in training order: a chunk, or a part of one."""

    pooled: Ids
    unpooled: Ids
    dense_RF: Tensor
    labels_RT: Tensor
    weights_RT: Tensor
    keys_RK: Tensor
    items: ItemIds | None = None
    """None where the model reads no content."""

    @property
    def num_rows(self) -> int:
        """Rows held."""
        return len(self.keys_RK)

    def cut(self, start: int, stop: int) -> "Rows":
        """Rows [start, stop), sharing memory."""
        return Rows(
            self.pooled.cut(start, stop),
            self.unpooled.cut(start, stop),
            self.dense_RF[start:stop],
            self.labels_RT[start:stop],
            self.weights_RT[start:stop],
            self.keys_RK[start:stop],
            None if self.items is None else self.items.cut(start, stop),
        )

    def to_batch(self, batch_size: int, num_real_rows: int | None = None) -> RankingBatch:
        """A batch of `batch_size` rows; missing ones repeat real rows with weight 0.

        Args:
            batch_size: rows of the batch, at least `num_rows`.
            num_real_rows: the first so many rows count; by default all do.
        """
        num_real_rows = self.num_rows if num_real_rows is None else num_real_rows
        rows = self
        while rows.num_rows < batch_size:
            filling = rows.cut(0, min(rows.num_rows, batch_size - rows.num_rows))
            rows = concat_rows([rows, filling])
        weights_BT = rows.weights_RT
        if num_real_rows < batch_size:
            weights_BT = weights_BT.clone()
            weights_BT[num_real_rows:] = 0
        return RankingBatch(
            dense_BF=rows.dense_RF,
            pooled=rows.pooled.to_kjt(),
            unpooled=rows.unpooled.to_kjt(),
            labels_BT=rows.labels_RT,
            weights_BT=weights_BT,
            keys_BK=rows.keys_RK,
            num_rows=num_real_rows,
            content=None if rows.items is None else rows.items.to_item_rows(),
        )


def concat_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, in order; a single part is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        _concat_ids([part.pooled for part in parts]),
        _concat_ids([part.unpooled for part in parts]),
        torch.cat([part.dense_RF for part in parts]),
        torch.cat([part.labels_RT for part in parts]),
        torch.cat([part.weights_RT for part in parts]),
        torch.cat([part.keys_RK for part in parts]),
        _concat_items([part.items for part in parts]),
    )


class SampleColumns:
    """Which columns of a sample table become which part of a batch."""

    def __init__(
        self,
        schema: FeatureSchema,
        tasks: Sequence[str],
        *,
        list_columns: frozenset[str],
        weights: frozenset[str] = frozenset(),
        items: ItemSource | None = None,
    ) -> None:
        """Name the columns.

        Args:
            schema: of the features.
            tasks: in the order of the labels.
            list_columns: the sparse columns that hold lists.
            weights: the columns with weights of a task's rows that there are.
            items: whose rows batches tell.
        """
        self.pooled = [_IdSource.of(f, schema) for f in schema.pooled_features]
        self.unpooled = [_IdSource.of(f, schema) for f in schema.unpooled_features]
        self.unpooled += [_IdSource.of(f, schema) for f in schema.sequences]
        self.dense = [samples.dense_column(f.name) for f in schema.dense]
        self.labels = [samples.label_column(task) for task in tasks]
        self.weights = {
            index: name
            for index, name in enumerate(samples.weight_column(task) for task in tasks)
            if name in weights
        }
        """By place of the task."""
        self.keys = [samples.key_column(key) for key in samples.KEYS]
        self.list_columns = list_columns
        self.items = items
        # Features side by side: OpenMP inside each would wait for cores that training holds.
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="hash")

    @property
    def names(self) -> list[str]:
        """All columns to read."""
        ids = [source.column for source in (*self.pooled, *self.unpooled)]
        return [*self.keys, *self.labels, *self.weights.values(), *self.dense, *ids]

    def rows(self, table: pa.Table, order: Tensor) -> Rows:
        """The rows of `table` that `order` (int64) names, in that order.

        Raises:
            UserError: a column that must not hold nulls does.
        """
        labels_RT = stack_floats(table, self.labels)[order]
        weights_RT = torch.ones_like(labels_RT)
        for task, name in self.weights.items():
            weights_RT[:, task] = stack_floats(table, [name])[order, 0]
        return Rows(
            pooled=self._ids(table, self.pooled, order),
            unpooled=self._ids(table, self.unpooled, order),
            dense_RF=stack_floats(table, self.dense)[order],
            labels_RT=labels_RT,
            weights_RT=weights_RT,
            keys_RK=torch.stack([int64(table, name) for name in self.keys], dim=1)[order],
            items=None if self.items is None else _item_ids(table, self.items, order),
        )

    def _ids(self, table: pa.Table, sources: "Sequence[_IdSource]", order: Tensor) -> Ids:
        names = tuple(source.feature for source in sources)
        if not any(source.column in self.list_columns for source in sources):
            # Waking a thread takes longer than hashing the few rows of a request.
            each = map if len(order) < _ROWS_FOR_THREADS else self._pool.map
            rows = each(lambda s: _ordered_rows(table, s, order), sources)
            return SingleIds(names, tuple(rows))
        values, offsets = [], []
        for source in sources:
            if source.column in self.list_columns:
                raw_N, raw_offsets = int64_lists(table, source.column)
                taken_N, taken_offsets = take_segments(raw_N, raw_offsets, order)
            else:
                taken_N = int64(table, source.column)[order]
                taken_offsets = torch.arange(len(order) + 1)
            values.append(rows_of(taken_N, source.table))
            offsets.append(taken_offsets)
        return JaggedIds(names, tuple(values), tuple(offsets))


@dataclass(frozen=True)
class _IdSource:
    """A looked-up feature: its column in the samples and its table."""

    feature: str
    column: str
    table: TableConfig

    @classmethod
    def of(cls, feature: SparseFeature | SequenceFeature, schema: FeatureSchema) -> "_IdSource":
        column = (
            samples.sequence_column(feature.name)
            if isinstance(feature, SequenceFeature)
            else samples.sparse_column(feature.name)
        )
        return cls(feature.name, column, schema.table(feature.table))


@lru_cache(maxsize=4)
def _one_id_each(total: int) -> tuple[Tensor, Tensor]:
    """Lengths and offsets shared by all batches of one size; nobody writes into them."""
    return torch.ones(total, dtype=torch.int64), torch.arange(total + 1)


def _empty_kjt() -> KeyedJaggedTensor:
    none = torch.empty(0, dtype=torch.int64)
    return KeyedJaggedTensor(keys=[], values=none, lengths=none)


def _ordered_rows(table: pa.Table, source: _IdSource, order: Tensor) -> Tensor:
    return rows_of(int64(table, source.column), source.table).index_select(0, order)


def _concat_ids(parts: Sequence[Ids]) -> Ids:
    if isinstance(parts[0], SingleIds):
        return SingleIds.concat([part for part in parts if isinstance(part, SingleIds)])
    return JaggedIds.concat([part for part in parts if isinstance(part, JaggedIds)])


def _item_ids(table: pa.Table, source: ItemSource, order: Tensor) -> ItemIds:
    candidate_R = source.index.rows_of(int64(table, samples.key_column("item_id")))
    values, offsets = [], []
    for sequence in source.histories.values():
        raw_N, raw_offsets = int64_lists(table, samples.sequence_column(sequence))
        rows_N, taken_offsets = take_segments(source.index.rows_of(raw_N), raw_offsets, order)
        values.append(rows_N)
        offsets.append(taken_offsets)
    histories = JaggedIds(tuple(source.histories), tuple(values), tuple(offsets))
    return ItemIds(candidate_R[order], histories)


def _concat_items(parts: Sequence[ItemIds | None]) -> ItemIds | None:
    known = [part for part in parts if part is not None]
    return ItemIds.concat(known) if known else None
