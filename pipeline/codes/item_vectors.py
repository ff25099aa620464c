"""Item vectors of a day; those that users deliver with the catalogue are checked item by item."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedding.errors import UserError
from embedding.raw_ids import Int64Array, to_raw_ids
from multimodal.codes.config import ColumnVectors
from multimodal.codes.vectors import BoolArray, Float32Array, FloatArray, row_digests, rows_in_file
from pipeline.codes.kept_codes import KeptCodes
from pipeline.samples.contract import check_present, open_parquet, read_columns


@dataclass(frozen=True)
class CatalogueVectors:
    """Vectors of the items that have one."""

    item_ids_N: Int64Array
    """Ascending."""
    vectors_ND: Float32Array
    encoder: str
    """Identity of the model that made them, their dimension included."""
    num_without: int
    """Items of the catalogue without a vector: they get no codes."""
    file: Path | None = None
    """Where the vectors lie as an .npy file; None: in memory only."""


@dataclass(frozen=True)
class ItemVectors:
    """Aligned vectors of all items of a day, in memory or memory-mapped."""

    item_ids_N: Int64Array
    vectors_ND: FloatArray
    encoder: str
    """Identity of the encoder."""
    first_day: str
    """Of the days whose items these are."""
    last_day: str
    earlier: pa.Table | None = None
    """Codes of the day before: suffixes stay with their items, and codebooks for a new encoder are
    matched through the items of both days."""
    version: str | None = None
    """Codebooks of the day before; None on the first day."""
    seen_N: BoolArray | None = None
    """Items that codebooks may be fitted to; the others only get codes. None: all of them."""
    kept: KeptCodes | None = None
    """Codes of the day before that may still hold; None: all are looked up."""
    file: Path | None = None
    """Where the vectors lie as an .npy file, for processes that read a part of them."""

    @cached_property
    def seen(self) -> "ItemVectors":
        """The items that codebooks may be fitted to; a copy of their vectors, made once.

        Of vectors in a file the copy is in one, too, which goes with it.
        """
        if self.seen_N is None or self.seen_N.all():
            return self
        if self.file is None:
            vectors_ND = self.vectors_ND[self.seen_N]
        else:
            rows = np.flatnonzero(self.seen_N)
            vectors_ND = rows_in_file(self.vectors_ND, rows, self.file.parent)
        return replace(
            self,
            item_ids_N=self.item_ids_N[self.seen_N],
            vectors_ND=vectors_ND,
            seen_N=None,
            kept=None,
            file=None,
        )

    @cached_property
    def digests(self) -> Int64Array:
        """Of the vectors (N,).

        Raises:
            UserError: one of them holds NaN or infinity.
        """
        return row_digests(self.vectors_ND)


def read_column_vectors(root: Path, source: ColumnVectors) -> CatalogueVectors:
    """Vectors of a column of items.parquet.

    Raises:
        UserError: the column is missing, holds no lists of floats of one length, or a vector holds
            NaN or infinity.
    """
    path = root / "items.parquet"
    with open_parquet(path) as file:
        schema = file.schema_arrow
    check_present(schema, ["item_id", source.column], path)
    kind = schema.field(source.column).type
    if not _is_vector(kind):
        raise UserError(
            f"{path}: column {source.column!r} has type {kind} but must hold the items' vectors as "
            "lists of floats; write it as list<float32>, or name another column in "
            "codes.vectors.column"
        )
    table = read_columns(path, ["item_id", source.column])
    known = table.filter(table[source.column].is_valid())
    if not known.num_rows:
        raise UserError(
            f"{path}: column {source.column!r} is null for all {table.num_rows} items; write their "
            "vectors, or set codes=null"
        )
    ids = to_raw_ids(known["item_id"]).to_numpy()
    order = np.argsort(ids, kind="stable")
    vectors = known[source.column]
    lengths = np.asarray(pc.list_value_length(vectors), np.int64)
    dim = int(np.bincount(lengths).argmax())
    others = order[lengths[order] != dim]
    _refuse(known, others, path, f"does not have {dim} elements like most others")
    vectors_ND = np.empty((len(ids), dim), np.float32)
    places = np.argsort(order)
    for chunk in vectors.chunks:  # one array of lists holds 2^31 elements at most
        flat = chunk.flatten().cast(pa.float32(), safe=False).fill_null(np.nan)
        own, places = np.split(places, [len(chunk)])
        vectors_ND[own] = flat.to_numpy().reshape(len(chunk), dim)
    broken = order[~np.isfinite(vectors_ND).all(axis=1)]
    _refuse(known, broken, path, "holds NaN, null or infinity")
    return CatalogueVectors(
        ids[order],
        vectors_ND,
        f"column:{source.column}/{source.encoder}/{dim}",
        table.num_rows - len(ids),
    )


def _is_vector(kind: pa.DataType) -> bool:
    is_list = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    return bool(is_list and pa.types.is_floating(kind.value_type))


def _refuse(known: pa.Table, rows: Int64Array, path: Path, fault: str) -> None:
    if len(rows):
        item = known["item_id"][int(rows[0])].as_py()
        raise UserError(
            f"{path}: the vector {known.column_names[1]!r} of item_id {item!r} {fault} "
            f"({len(rows)} items in all); encode these items again, or write null so that they get "
            "no codes"
        )
