"""The data contract of the event log, as checks.

    events/dt=YYYY-MM-DD/*.parquet
        request_id, user_id, item_id   integer or string
        timestamp                      Arrow timestamp of any unit (UTC); inside of the dt day
        <task label>                   0, 1 or null (the task was not observed)
        <row weight of a task>         a number of 0 or more; null: 1
        oracle_<task>                  optional: true probability (synthetic data)
        anything else                  context columns, read where a feature names them

Faults of a file or a column raise `UserError`; faults of a row are returned as a reason, so that
ingest puts the row into quarantine and counts it. So does it with rows that repeat all four keys of
an earlier one of their day (`pipeline.samples.buckets.repeats`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding.errors import UserError
from embedding.raw_ids import Int64Array, id_lists, is_id_list_type, is_id_type, to_raw_ids
from pipeline.days import PARTITION, available_days, day_files, parse_day
from pipeline.samples.column_kinds import column_kinds
from pipeline.samples.columns import KEY_COLUMNS, ColumnKind, EventColumns, SourceColumns
from pipeline.samples.logged_histories import list_type_faults, logged_faults, logged_histories

MS_PER_DAY = 86_400_000

BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class CatalogueIds:
    """Ids that events may refer to; sorted."""

    items: Int64Array
    users: Int64Array | None
    """None: there is no users.parquet, and every user id is welcome."""


@dataclass(frozen=True)
class EventFile:
    """One Parquet file of the event log."""

    path: Path
    day: str
    num_rows: int
    row_groups: tuple[int, ...]
    """Rows of each row group."""
    column_names: frozenset[str]
    kinds: dict[str, ColumnKind]
    """Of the ids that the recipe reads."""


# --- files ---------------------------------------------------------------------------------------


def epoch_day(day: str) -> int:
    """Days from 1970-01-01 to `day` (YYYY-MM-DD).

    Raises:
        UserError: it is not such a date.
    """
    return (parse_day(day, "event log") - date(1970, 1, 1)).days


def event_files(root: Path, day: str, columns: EventColumns) -> list[EventFile]:
    """The files of one day, by name, each with a checked schema.

    Raises:
        UserError: the day is missing or empty, or a file is unreadable or has a wrong schema.
    """
    folder = root / "events" / f"{PARTITION}{day}"
    if not folder.is_dir():
        available = available_days(root)
        raise UserError(
            f"{folder} does not exist: the event log of {day} is missing (there are days from "
            f"{available[0]} to {available[-1]}); deliver it or choose another date"
        )
    paths = day_files(root, [day])
    files = []
    for path in paths:
        with open_parquet(path) as file:
            check_event_schema(file.schema_arrow, columns, path)
            files.append(event_file(file, path, day, columns))
    if not sum(described.num_rows for described in files):
        raise UserError(empty_day_fault(root, day, len(files)))
    return files


def empty_day_fault(root: Path, day: str, num_files: int) -> str:
    """Of a day whose files hold no row."""
    return (
        f"{root / 'events' / (PARTITION + day)} is empty: no event on {day} in {num_files} Parquet "
        "files; deliver the day's events or choose another date"
    )


def open_parquet(path: Path) -> pq.ParquetFile:
    """Open a Parquet file.

    Raises:
        UserError: it is missing, a directory, or no complete Parquet file.
    """
    if path.is_dir():
        raise UserError(
            f"{path} is a directory; one file, please. Spark writes part files, and one with "
            "coalesce(1), to be renamed; or merge them: pyarrow.parquet.write_table("
            "pyarrow.parquet.read_table(DIRECTORY), FILE)"
        )
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; deliver it or correct data.root") from error
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error


def read_columns(
    path: Path, columns: Sequence[str], row_groups: Sequence[int] | None = None
) -> pa.Table:
    """Read some columns (and row groups) of a Parquet file.

    Raises:
        UserError: the file is damaged.
    """
    with open_parquet(path) as file:
        groups = range(file.num_row_groups) if row_groups is None else row_groups
        try:
            return file.read_row_groups(list(groups), columns=list(columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error


def first_rows(path: Path, columns: Sequence[str], number: int) -> pa.Table:
    """Some columns of the first rows of a Parquet file that has rows.

    Raises:
        UserError: the file is damaged.
    """
    with open_parquet(path) as file:
        try:
            batches = file.iter_batches(number, columns=list(columns), use_threads=False)
            return pa.Table.from_batches([next(batch for batch in batches if batch.num_rows)])
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    first_line = str(error).splitlines()[0]
    return UserError(
        f"{path} is not a complete Parquet file ({first_line}); it may be truncated: write or "
        "copy it again"
    )


def event_file(file: pq.ParquetFile, path: Path, day: str, columns: EventColumns) -> EventFile:
    """What is to be known of an open file whose schema is sound."""
    groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    names = frozenset(file.schema_arrow.names)
    kinds = column_kinds(file.schema_arrow, columns)
    return EventFile(path, day, sum(groups), tuple(groups), names, kinds)


# --- columns -------------------------------------------------------------------------------------


def check_event_schema(schema: pa.Schema, columns: EventColumns, path: Path) -> None:
    """Refuse a missing column or a wrong type.

    Raises:
        UserError: the first of `event_schema_faults`.
    """
    refuse_first(event_schema_faults(schema, columns, path))


def refuse_first(faults: Iterator[str]) -> None:
    """Raise the first of some faults.

    Raises:
        UserError: there is one.
    """
    for fault in faults:
        raise UserError(fault)


def event_schema_faults(schema: pa.Schema, columns: EventColumns, path: Path) -> Iterator[str]:
    """Missing columns and wrong types: the file, the column, its type and the cast to write."""
    yield from presence_faults(schema, columns.required, path)
    for name in KEY_COLUMNS:
        kind = _kind(schema, name)
        if kind is not None and not is_id_type(kind):
            yield _wrong_type(path, name, kind, "an integer or a string", "int64")
    kind = _kind(schema, "timestamp")
    if kind is not None and not pa.types.is_timestamp(kind):
        hint = "integers need their unit" if pa.types.is_integer(kind) else "UTC"
        yield _wrong_type(path, "timestamp", kind, "an Arrow timestamp", f"timestamp('ms'), {hint}")
    labels = dict.fromkeys(columns.labels, ("0, 1 or null", "int8"))
    weights = dict.fromkeys(columns.weights.values(), ("a weight", "float32"))
    for name, (wanted, cast) in [*labels.items(), *weights.items()]:
        kind = _kind(schema, name)
        if kind is not None and not _is_number(kind):
            yield _wrong_type(path, name, kind, wanted, cast)
    for name, wanted, cast in list_type_faults(schema, columns):
        yield _wrong_type(path, name, schema.field(name).type, wanted, cast)
    ids = tuple(name for name in columns.ids if name not in columns.labels)
    yield from feature_type_faults(schema, columns.model_copy(update={"ids": ids}), path)
    for name in columns.oracles.values():
        kind = _kind(schema, name)
        if kind is not None and not pa.types.is_floating(kind):
            yield _wrong_type(path, name, kind, "a probability", "float32")


def check_present(schema: pa.Schema, names: Sequence[str], path: Path) -> None:
    """Refuse missing and repeated columns.

    Raises:
        UserError: names the file and the columns.
    """
    refuse_first(presence_faults(schema, names, path))


def presence_faults(schema: pa.Schema, names: Sequence[str], path: Path) -> Iterator[str]:
    """Missing and repeated columns: the file and the columns."""
    missing = [name for name in names if name not in schema.names]
    if missing:
        yield (
            f"{path} lacks the columns {missing} that the recipe reads; it has {schema.names}: "
            "write them or correct the recipe's features and tasks"
        )
    twice = [name for name in names if schema.names.count(name) > 1]
    if twice:
        yield f"{path} has more than one column {twice[0]!r}; rename or drop the others"


def feature_type_faults(schema: pa.Schema, columns: SourceColumns, path: Path) -> Iterator[str]:
    """Feature columns that are there and neither categorical (one id in sequences) nor numeric."""
    for name in columns.ids:
        kind = _kind(schema, name)
        if kind is not None and not (is_id_type(kind) or is_id_list_type(kind)):
            yield _wrong_type(path, name, kind, "an integer, a string or a list of them", "int64")
        elif kind is not None and name in columns.sequence and is_id_list_type(kind):
            yield (
                f"{path}: features.sequences read the list column {name!r} ({kind}), but a "
                "sequence holds one id an event; choose a single-valued column"
            )
    for name in columns.dense:
        kind = _kind(schema, name)
        if kind is not None and not _is_number(kind):
            yield _wrong_type(path, name, kind, "a number", "float32")


def _kind(schema: pa.Schema, name: str) -> pa.DataType | None:
    """Type of a column; None where there is none, or more than one."""
    return schema.field(name).type if schema.names.count(name) == 1 else None


def _is_number(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_null(kind)
    )


def _wrong_type(path: Path, name: str, kind: pa.DataType, wanted: str, cast: str) -> str:
    return (
        f"{path}: column {name!r} has type {kind} but must be {wanted}; cast it to {cast} where "
        "the file is written"
    )


# --- rows ----------------------------------------------------------------------------------------


def normalise_events(table: pa.Table, columns: EventColumns, path: Path) -> pa.Table:
    """Events with the types that the pipeline works on; nulls stay null.

    Keys, timestamp (milliseconds) and id columns become int64 (or lists of it), labels, dense and
    oracle columns float32; the numbers of a column that is both lie beside its ids
    (`number_column`), its labels are int64. Absent oracle columns become null.

    Raises:
        UserError: a column holds values that its type cannot take.
    """
    labels = [name for name in columns.labels if not is_id_type(table[name].type)]
    try:
        data = {name: to_raw_ids(table[name]) for name in KEY_COLUMNS}
        timestamp = table["timestamp"].cast(pa.timestamp("ms"), safe=False)
        data["timestamp"] = timestamp.cast(pa.int64()).combine_chunks()
        for name in columns.ids:
            ids = to_raw_ids(_label_to_int(table[name]) if name in labels else table[name])
            is_single = name in columns.lists and not is_id_list_type(ids.type)
            data[name] = id_lists(ids) if is_single else ids
        for name in (*columns.labels, *columns.weights.values()):
            if name not in data:
                data[name] = as_float32(table[name]).combine_chunks()
        for name in columns.dense:
            data[columns.number_column(name)] = as_float32(table[name]).combine_chunks()
        for name in columns.oracles.values():
            if name in table.column_names:
                data[name] = table[name].cast(pa.float32()).combine_chunks()
            else:  # another file of the span has it
                data[name] = pa.nulls(table.num_rows, pa.float32())
    except pa.ArrowException as error:
        raise UserError(f"{path}: column {name!r} cannot be read ({error}); correct it") from error
    return pa.table(data | logged_histories(table, columns, path))


def as_float32(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """A numeric column as samples hold it: infinite where float32 cannot hold a value."""
    return column.cast(pa.float32(), safe=False)


def _label_to_int(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A label of fractions or decimals that a history carries, as the ids 0 and 1."""
    # Anything else is quarantined by `row_faults`, which sees the original column.
    numbers = column.cast(pa.float64(), safe=False)
    known = pc.is_in(numbers, value_set=pa.array([0.0, 1.0]))
    return pc.if_else(known, numbers, None).cast(pa.int64())


def row_faults(
    table: pa.Table, events: pa.Table, columns: EventColumns, day: str, known: CatalogueIds
) -> tuple[Int64Array, list[str]]:
    """The first fault of every row.

    Args:
        table: the rows as they were read.
        events: the same rows, normalised.
        columns: what the recipe reads.
        day: the day the file belongs to.
        known: ids of items and users.

    Returns:
        An index into the reasons for every row, -1 for a sound row; and the reasons.
    """
    faults: list[tuple[str, BoolArray]] = []
    for name in (*KEY_COLUMNS, "timestamp"):
        faults.append((f"null {name}", _bools(events[name].is_null())))
    days = events["timestamp"].fill_null(0).to_numpy() // MS_PER_DAY
    faults.append(("timestamp outside of the dt day", days != epoch_day(day)))
    for name in dict.fromkeys((*columns.labels, *columns.dense)):
        if name in columns.labels:
            values = table[name].cast(pa.float64(), safe=False)
            is_label = pc.is_in(values, value_set=pa.array([0.0, 1.0, None]))
            faults.append((f"label {name} not 0, 1 or null", ~_bools(is_label)))
        else:
            finite = pc.is_finite(as_float32(table[name])).fill_null(True)
            faults.append((f"NaN or inf in dense column {name}", ~_bools(finite)))
    for name in dict.fromkeys(columns.weights.values()):
        values = as_float32(table[name]).fill_null(1.0)
        is_weight = pc.and_(pc.is_finite(values), pc.greater_equal(values, 0.0))
        faults.append((f"weight {name} not a number of 0 or more", ~_bools(is_weight)))
    faults += logged_faults(events, columns)
    faults.append(("item_id without catalogue row", ~_known(events["item_id"], known.items)))
    if known.users is not None:
        faults.append(
            ("user_id without row in users.parquet", ~_known(events["user_id"], known.users))
        )
    reason = np.full(table.num_rows, -1, np.int64)
    for i in reversed(range(len(faults))):  # the first fault is written last and stays
        reason[faults[i][1]] = i
    return reason, [name for name, _ in faults]


def _known(ids: pa.ChunkedArray, sorted_ids: Int64Array) -> BoolArray:
    values = ids.fill_null(0).to_numpy()
    if not len(sorted_ids):
        return np.zeros(len(values), np.bool_)
    at = np.minimum(np.searchsorted(sorted_ids, values), len(sorted_ids) - 1)
    return np.asarray(sorted_ids[at] == values)


def _bools(column: pa.ChunkedArray) -> BoolArray:
    return np.asarray(column.to_numpy(), np.bool_)
