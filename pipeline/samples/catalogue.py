"""The data contract of items.parquet and users.parquet, as checks.

items.parquet   item_id, categorical columns (integer, string or a list of them), dense columns,
                text (string), image (a JPEG, PNG, WEBP, GIF, BMP or TIFF file: its bytes, or a path
                relative to the data root without `..`; may be null)
users.parquet   optional: user_id, categorical and dense columns
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.raw_ids import Int64Array, is_id_type, to_raw_ids
from pipeline.samples.column_kinds import column_kind
from pipeline.samples.columns import ColumnKind, SourceColumns, source_columns
from pipeline.samples.contract import (
    CatalogueIds,
    as_float32,
    feature_type_faults,
    open_parquet,
    presence_faults,
    read_columns,
    refuse_first,
)


def check_catalogue(root: Path, features: FeatureSchema) -> CatalogueIds:
    """Check items.parquet and users.parquet against what the recipe reads.

    Returns:
        The sorted raw ids of items and, if there is a users.parquet, of users.

    Raises:
        UserError: a file or column is missing, has a wrong type, a null or repeated id, or a NaN.
    """
    items = check_entities(root / "items.parquet", "item_id", source_columns(features, "items"))
    path = root / "users.parquet"
    columns = source_columns(features, "users")
    if not path.exists():
        if columns.ids or columns.dense:
            raise UserError(
                f"{path} does not exist, but features read the user columns "
                f"{[*columns.ids, *columns.dense]}; deliver it or remove those features"
            )
        return CatalogueIds(items, None)
    return CatalogueIds(items, check_entities(path, "user_id", columns))


def entity_faults(path: Path, key: str, columns: SourceColumns) -> Iterator[str]:
    """Missing columns and wrong types of items.parquet or users.parquet.

    Raises:
        UserError: the file is missing or damaged.
    """
    with open_parquet(path) as file:
        schema = file.schema_arrow
    yield from presence_faults(schema, [key, *columns.ids, *columns.dense], path)
    if schema.names.count(key) == 1 and not is_id_type(schema.field(key).type):
        yield (
            f"{path}: column {key!r} has type {schema.field(key).type} but must be an integer or "
            "a string; cast it to int64 where the file is written"
        )
    yield from feature_type_faults(schema, columns, path)


def check_entities(path: Path, key: str, columns: SourceColumns) -> Int64Array:
    """Check items.parquet or users.parquet.

    Returns:
        The sorted raw ids.

    Raises:
        UserError: a column is missing, has a wrong type, a null or repeated id, or a NaN.
    """
    refuse_first(entity_faults(path, key, columns))
    table = read_columns(path, [key, *columns.dense])
    _check_dense(table, key, columns.dense, path)
    if table[key].null_count:
        row = pc.index(table[key].is_null(), True).as_py()
        raise UserError(f"{path}: {key} is null in row {row}; give the row an id or drop it")
    ids = to_raw_ids(table[key]).to_numpy()
    order = np.argsort(ids, kind="stable")
    repeated = np.flatnonzero(ids[order][1:] == ids[order][:-1])
    if len(repeated):
        twice = table[key][int(order[repeated[0]])].as_py()
        raise UserError(
            f"{path}: {key} {twice!r} has more than one row ({len(repeated)} rows too many in "
            "all); keep one row an id"
        )
    return np.asarray(ids[order])


def catalogue_kinds(
    root: Path, known: CatalogueIds
) -> Iterator[tuple[Path, dict[str, ColumnKind]]]:
    """What the ids of items.parquet and users.parquet are, by file.

    Args:
        root: of the data.
        known: ids of the files that were read; files without any are left out.
    """
    for source, ids in (("items", known.items), ("users", known.users)):
        if ids is not None:
            path, key = root / f"{source}.parquet", f"{source.removesuffix('s')}_id"
            with open_parquet(path) as file:
                yield path, {key: column_kind(file.schema_arrow.field(key).type)}


def _check_dense(table: pa.Table, key: str, dense: Sequence[str], path: Path) -> None:
    for name in dense:
        wrong = pc.invert(pc.is_finite(as_float32(table[name])))
        count = pc.sum(wrong).as_py() or 0
        if count:
            owner = table[key][pc.index(wrong, True).as_py()].as_py()
            raise UserError(
                f"{path}: dense column {name!r} is NaN or infinite as float32 for {key} {owner!r} "
                f"(in {count} rows); write null where a value is missing"
            )
