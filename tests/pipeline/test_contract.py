"""Faults of files, columns and catalogues: one sentence with place and remedy."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_log import DAYS, event, make_recipe, write_catalogue, write_day

from embedding.errors import UserError
from pipeline.samples.catalogue import check_catalogue
from pipeline.samples.columns import EventColumns
from pipeline.samples.contract import EventFile, event_files, normalise_events


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_catalogue(tmp_path)
    write_day(tmp_path, 0, [[event(0, 1, s) for s in range(6)]])
    return tmp_path


def day_file(root: Path) -> Path:
    return root / "events" / f"dt={DAYS[0]}" / "part-00000.parquet"


def read_day(root: Path, day: str = DAYS[0]) -> list[EventFile]:
    return event_files(root, day, EventColumns.of(make_recipe(root)))


def rewrite(path: Path, column: str, values: Any) -> None:
    table = pq.ParquetFile(path).read()
    if values is None:
        table = table.drop_columns(column)
    else:
        array = values if isinstance(values, pa.Array) else table[column].cast(values)
        table = table.set_column(table.column_names.index(column), column, array)
    pq.write_table(table, path)


def refused(call: Any, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    for part in parts:
        assert part in str(error.value)


# --- event files ---------------------------------------------------------------------------------


def test_sound_day_is_accepted(root: Path) -> None:
    (file,) = read_day(root)

    assert (file.num_rows, file.row_groups) == (6, (4, 2))


@pytest.mark.parametrize(
    "column", ["request_id", "item_id", "timestamp", "click", "price", "stars"]
)
def test_missing_column_is_named(root: Path, column: str) -> None:
    rewrite(day_file(root), column, None)

    refused(lambda: read_day(root), str(day_file(root)), f"lacks the columns ['{column}']", "write")


@pytest.mark.parametrize(
    ("column", "kind", "remedy"),
    [
        ("user_id", pa.float64(), "cast it to int64"),
        ("timestamp", pa.int64(), "cast it to timestamp('ms'), integers need their unit"),
        ("click", pa.string(), "cast it to int8"),
        ("price", pa.string(), "cast it to float32"),
        ("stars", pa.float32(), "cast it to int64"),
    ],
)
def test_wrong_type_is_named_with_the_cast(
    root: Path, column: str, kind: pa.DataType, remedy: str
) -> None:
    rewrite(day_file(root), column, kind)

    refused(lambda: read_day(root), str(day_file(root)), f"'{column}' has type {kind}", remedy)


def test_sequence_over_a_list_column_is_refused(root: Path) -> None:
    rewrite(day_file(root), "device", pa.array([["a", "b"]] * 6))
    assert read_day(root)  # a pooled feature takes lists

    rewrite(day_file(root), "stars", pa.array([[1, 2]] * 6))
    refused(lambda: read_day(root), str(day_file(root)), "list column 'stars'", "single-valued")


def test_truncated_file_is_named(root: Path) -> None:
    content = day_file(root).read_bytes()
    day_file(root).write_bytes(content[: len(content) // 2])

    refused(lambda: read_day(root), str(day_file(root)), "truncated", "write or copy it again")


def test_missing_day_names_the_days_there_are(root: Path) -> None:
    refused(lambda: read_day(root, "2024-02-01"), "dt=2024-02-01", f"from {DAYS[0]} to {DAYS[0]}")


def test_day_without_rows_or_files_is_refused(root: Path) -> None:
    pq.write_table(pq.ParquetFile(day_file(root)).read().slice(0, 0), day_file(root))
    refused(lambda: read_day(root), f"dt={DAYS[0]} is empty", "1 Parquet files")

    day_file(root).unlink()
    refused(lambda: read_day(root), f"dt={DAYS[0]} is empty", "0 Parquet files")


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_timestamps_of_any_unit_become_milliseconds(root: Path, unit: str) -> None:
    columns = EventColumns.of(make_recipe(root))
    table = pq.ParquetFile(day_file(root)).read()
    expected = table["timestamp"].cast(pa.int64()).to_pylist()
    at = table.column_names.index("timestamp")
    table = table.set_column(at, "timestamp", table["timestamp"].cast(pa.timestamp(unit)))

    events = normalise_events(table, columns, day_file(root))

    assert events["timestamp"].to_pylist() == expected


# --- items.parquet and users.parquet -------------------------------------------------------------


def catalogue(root: Path) -> Any:
    return check_catalogue(root, make_recipe(root).features)


def test_sound_catalogue_gives_its_sorted_ids(root: Path) -> None:
    known = catalogue(root)

    assert known.items.tolist() == [1, 2, 3, 4]
    assert known.users.tolist() == [1, 2, 3, 4, 5]


def test_missing_items_file_is_named(root: Path) -> None:
    (root / "items.parquet").unlink()

    refused(lambda: catalogue(root), str(root / "items.parquet"), "does not exist", "deliver it")


def test_a_directory_of_part_files_is_refused_as_one(root: Path) -> None:
    path = root / "items.parquet"
    parts = path.rename(root / "part-00000.parquet")
    path.mkdir()
    parts.rename(path / "part-00000.parquet")
    refused(lambda: catalogue(root), f"{path} is a directory; one file, please", "coalesce(1)")

    # The remedy, as it stands.
    pq.write_table(pq.read_table(path), root / "one.parquet")
    (path / "part-00000.parquet").unlink()
    path.rmdir()
    (root / "one.parquet").rename(path)
    assert catalogue(root).items.tolist() == [1, 2, 3, 4]


def test_missing_users_file_matters_only_if_features_read_it(root: Path) -> None:
    (root / "users.parquet").unlink()
    refused(lambda: catalogue(root), str(root / "users.parquet"), "['country']", "deliver it")

    features = make_recipe(root).features
    sparse = tuple(feature for feature in features.sparse if feature.source != "users")
    without = features.model_copy(update={"sparse": sparse})
    assert check_catalogue(root, without).users is None


def test_repeated_and_null_ids_are_named(root: Path) -> None:
    rewrite(root / "items.parquet", "item_id", pa.array([1, 2, 2, 4]))
    refused(lambda: catalogue(root), str(root / "items.parquet"), "item_id 2 has more than one row")

    rewrite(root / "items.parquet", "item_id", pa.array([1, 2, None, 4]))
    refused(lambda: catalogue(root), str(root / "items.parquet"), "item_id is null in row 2")

    rewrite(root / "items.parquet", "item_id", pa.array([1, 2, 3, 4]))
    rewrite(root / "users.parquet", "user_id", pa.array([7, 2, 3, 7, 5]))
    refused(lambda: catalogue(root), str(root / "users.parquet"), "user_id 7 has more than one row")


def test_nan_of_an_item_is_named(root: Path) -> None:
    rewrite(root / "items.parquet", "weight", pa.array([1.0, None, float("nan"), 2.0]))

    refused(lambda: catalogue(root), "'weight' is NaN or infinite as float32 for item_id 3", "null")


def test_number_of_an_item_beyond_float32_is_named(root: Path) -> None:
    rewrite(root / "items.parquet", "weight", pa.array([1.0, None, 3e38, -1e300]))

    refused(lambda: catalogue(root), "infinite as float32 for item_id 4 (in 1 rows)", "write null")


def test_missing_and_mistyped_catalogue_columns_are_named(root: Path) -> None:
    rewrite(root / "items.parquet", "tags", pa.array([1.5, 2.5, 3.5, 4.5]))
    refused(lambda: catalogue(root), str(root / "items.parquet"), "'tags' has type double", "int64")

    rewrite(root / "items.parquet", "tags", None)
    refused(lambda: catalogue(root), str(root / "items.parquet"), "lacks the columns ['tags']")


def test_sequence_over_a_list_column_of_items_is_refused(root: Path) -> None:
    rewrite(root / "items.parquet", "category", pa.array([["a"], ["b", "c"], None, []]))

    refused(lambda: catalogue(root), str(root / "items.parquet"), "list column 'category'")
