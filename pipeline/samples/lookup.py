"""Columns of items and users, looked up by id.

Every column has one more entry than there are rows: the last one stands for an unknown id, so that
the position -1 finds it without a branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedding.config import MISSING_ID
from embedding.errors import UserError
from embedding.feature_schema import DenseFeature
from embedding.raw_ids import Int64Array, ids_or_missing, to_raw_ids
from pipeline.samples.contract import as_float32, read_columns
from pipeline.samples.histories import ragged_positions

FloatArray = np.ndarray[Any, np.dtype[np.float32]]
Int32Array = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class IdLists:
    """A list column: the ids of row i are `values[offsets[i] : offsets[i + 1]]`."""

    offsets: Int64Array
    values: Int64Array | Int32Array
    """As narrow as they are stored; lists that are taken hold int64."""

    def take(self, rows: Int64Array, max_length: int | None) -> pa.ListArray:
        """The lists of some rows (-1: the last), each cut to its first `max_length` ids."""
        starts = self.offsets[:-1][rows]
        lengths = self.offsets[1:][rows] - starts
        if max_length is not None:
            lengths = np.minimum(lengths, max_length)
        positions, offsets = ragged_positions(starts, lengths)
        return pa.ListArray.from_arrays(
            pa.array(offsets.astype(np.int32)),
            pa.array(self.values[positions].astype(np.int64, copy=False)),
        )


@dataclass(frozen=True)
class EntityColumns:
    """Feature columns of items or users, in the order of their sorted ids."""

    sorted_ids: Int64Array
    ids: dict[str, Int64Array | IdLists]
    """By column; the last row is missing."""
    dense: dict[str, FloatArray]
    """By column, untransformed; NaN where missing, the last row included."""

    def positions(self, ids: Int64Array) -> Int64Array:
        """Row of each id, -1 for unknown ones."""
        if not len(self.sorted_ids):
            return np.full(len(ids), -1, np.int64)
        at = np.minimum(np.searchsorted(self.sorted_ids, ids), len(self.sorted_ids) - 1)
        return np.asarray(np.where(self.sorted_ids[at] == ids, at, -1))


def no_entities() -> EntityColumns:
    """A table without rows: every id is unknown."""
    return EntityColumns(np.empty(0, np.int64), {}, {})


def load_entities(path: Path, key: str, ids: Sequence[str], dense: Sequence[str]) -> EntityColumns:
    """Read feature columns of items.parquet or users.parquet.

    Raises:
        UserError: the file is damaged or lacks a column.
    """
    names = list(dict.fromkeys((key, *ids, *dense)))
    table = read_columns(path, names)
    lacking = [name for name in names if name not in table.column_names]
    if lacking:
        raise UserError(f"{path} lacks the columns {lacking}; write them or correct the recipe")
    keys, table = by_id(to_raw_ids(table[key]).to_numpy(), table)
    return EntityColumns(
        keys,
        {name: with_missing(id_column(table[name])) for name in ids},
        {name: np.append(floats(table[name]), np.float32(np.nan)) for name in dense},
    )


def by_id(ids_N: Int64Array, table: pa.Table) -> tuple[Int64Array, pa.Table]:
    """Ids and their rows by ascending id; as they are where they ascend already."""
    if (ids_N[1:] >= ids_N[:-1]).all():
        return ids_N, table
    order = np.argsort(ids_N, kind="stable")
    return ids_N[order], table.take(order)


def id_column(column: pa.ChunkedArray | pa.Array) -> Int64Array | IdLists:
    """A categorical column as raw ids; a null (also a null list) is one `MISSING_ID`."""
    array = to_raw_ids(column)
    if not pa.types.is_list(array.type) and not pa.types.is_large_list(array.type):
        return ids_or_missing(array)
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    is_null = np.asarray(array.is_null())
    lengths = np.where(is_null, 1, lengths).astype(np.int64)
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values = np.full(offsets[-1], MISSING_ID, np.int64)
    from_null = np.zeros(len(values), np.bool_)
    from_null[offsets[:-1][is_null]] = True
    values[~from_null] = ids_or_missing(array.flatten())
    return IdLists(offsets, values)


def with_missing(column: Int64Array | IdLists) -> Int64Array | IdLists:
    """The column and one missing row behind it."""
    if isinstance(column, IdLists):
        return IdLists(
            np.append(column.offsets, column.offsets[-1] + 1), np.append(column.values, MISSING_ID)
        )
    return np.append(column, MISSING_ID)


def floats(column: pa.ChunkedArray | pa.Array) -> FloatArray:
    """A numeric column as float32, NaN where it is null."""
    return np.asarray(as_float32(column).fill_null(np.nan).to_numpy(), np.float32)


def transform_dense(values: FloatArray, feature: DenseFeature) -> FloatArray:
    """Transform and scale; NaN becomes the feature's `missing`."""
    if feature.transform == "log1p":
        values = np.sign(values) * np.log1p(np.abs(values))
    scaled = ((values - feature.mean) / feature.std).astype(np.float32)
    return np.where(np.isnan(scaled), np.float32(feature.missing), scaled)
