"""`braid data check`: all faults of delivered data at once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from embedding.errors import UserError
from pipeline.data_cli import data_app
from pipeline.samples import delivery
from pipeline.samples.delivery import Delivery, check_delivery
from pipeline.samples.ingest import check_span
from tests.pipeline.small_log import DAYS, event, make_recipe, write_catalogue, write_day


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write_catalogue(root)
    for day in range(3):
        write_day(root, day, [[event(day, 1, s) for s in range(6)]])
    return root


def look(root: Path, day: str | None = None, **changes: Any) -> Delivery:
    return check_delivery(make_recipe(root, **changes), day)


def rewrite(path: Path, *missing: str, **columns: pa.Array) -> None:
    table = pq.ParquetFile(path).read().drop_columns(list(missing))
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, path)


def day_file(root: Path, day: int) -> Path:
    return root / "events" / f"dt={DAYS[day]}" / "part-00000.parquet"


def test_sound_data_has_no_faults(root: Path) -> None:
    found = look(root)

    assert (found.faults, found.warnings) == ([], [])
    assert (found.days, found.num_files, found.num_rows) == (DAYS[:3], 5, 18)
    assert look(root, DAYS[1]).days == [DAYS[1]]


def test_faults_of_all_files_and_columns_are_listed_at_once(root: Path) -> None:
    strings = pa.array(["x"] * 6)
    rewrite(day_file(root, 0), "click", "stars", price=strings)
    rewrite(day_file(root, 1), timestamp=pa.array(range(6)), user_id=pa.array([0.5] * 6))
    day_file(root, 2).write_bytes(b"nothing")
    rewrite(root / "items.parquet", "category", weight=pa.array(["w"] * 4))
    (root / "users.parquet").unlink()

    faults = look(root).faults

    expected = [
        "items.parquet lacks the columns ['category']",
        "items.parquet: column 'weight' has type string",
        "users.parquet does not exist, but features read the user columns ['country']",
        f"dt={DAYS[0]}/part-00000.parquet lacks the columns ['click', 'stars']",
        f"dt={DAYS[0]}/part-00000.parquet: column 'price' has type string",
        f"dt={DAYS[1]}/part-00000.parquet: column 'user_id' has type double",
        f"dt={DAYS[1]}/part-00000.parquet: column 'timestamp' has type int64",
        f"dt={DAYS[2]}/part-00000.parquet is not a complete Parquet file",
    ]
    assert len(faults) == len(expected), faults
    for sentence, part in zip(faults, expected, strict=True):
        assert part in sentence


def test_what_many_event_files_share_is_said_once(root: Path) -> None:
    for day in range(3):
        rewrite(day_file(root, day), "click")
    faults = look(root).faults
    assert len(faults) == 3
    (sentence,) = delivery.grouped(faults)
    assert f"dt={DAYS[0]}/part-00000.parquet lacks the columns ['click']" in sentence
    assert sentence.endswith("(so in 3 files)")
    assert delivery.grouped([*faults, "x", "y"]) == [sentence, "x", "y"]


def test_a_day_that_is_written_otherwise_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match="--date: '2024-1-1' is not a day; write it as YYYY-MM-DD"):
        look(root, "2024-1-1")


def test_values_of_the_catalogue_are_looked_at(root: Path) -> None:
    rewrite(root / "items.parquet", item_id=pa.array([1, 2, 2, 4]))
    (fault,) = look(root).faults
    assert "item_id 2 has more than one row" in fault


def test_first_rows_that_ingest_would_put_aside_are_counted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(day_file(root, 0), item_id=pa.array([1, 99, 99, 1, 99, 99]))
    (fault,) = look(root).faults
    assert "4 of the first 6 rows: item_id without catalogue row, first in row 1" in fault
    assert "data.max_quarantined_share=0.5" in fault
    monkeypatch.setattr(delivery, "ROWS_PER_DAY", 4)
    found = look(root)
    (warning,) = found.warnings
    assert "2 of the first 4 rows" in warning, "as many as are allowed"
    assert (found.faults, found.num_rows) == ([], 12)


def split(path: Path, *sizes: int) -> list[Path]:
    """A file's rows in several files; an empty row group comes first in each."""
    table, paths, start = pq.ParquetFile(path).read(), [], 0
    for part, size in enumerate(sizes):
        paths.append(path.with_name(f"part-{part:05d}.parquet"))
        with pq.ParquetWriter(paths[-1], table.schema) as writer:
            writer.write_table(table.slice(0, 0))
            writer.write_table(table.slice(start, size))
        start += size
    return paths


def test_rows_of_every_file_are_looked_at(root: Path) -> None:
    """Spark's first part is often empty; the day is judged as a whole, as ingest does it."""
    rewrite(day_file(root, 0), item_id=pa.array([1, 1, 1, 1, 99, 99]))
    paths = split(day_file(root, 0), 0, 3, 3)

    found = look(root)
    assert (found.faults, found.num_rows) == ([], 18)
    (warning,) = found.warnings
    assert f"{paths[2]}: 2 of the first 3 rows: item_id without catalogue row" in warning

    (fault,) = look(root, max_quarantined_share=0.3).faults
    assert fault.startswith(warning)


def test_rows_to_look_at_are_shared_by_the_files_of_a_day(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "ROWS_PER_DAY", 3)
    split(day_file(root, 0), 4, 2)

    assert look(root, DAYS[0]).num_rows == 2 + 2


def test_of_many_files_a_day_some_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FILES_PER_DAY", 2)
    split(day_file(root, 0), 1, 1, 1, 1, 2)

    assert look(root, DAYS[0]).num_rows == 1 + 1, "of the first and the fourth"


def test_damage_behind_the_footer_of_any_file_is_a_fault(root: Path) -> None:
    path = split(day_file(root, 1), 3, 3)[1]
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(200) + content[204:])

    (fault,) = look(root).faults

    assert fault.startswith(f"{path} is not a complete Parquet file")


def hold_no_rows(root: Path) -> None:
    split(day_file(root, 1), 0, 0)


def turn_to_strings(root: Path) -> None:
    rewrite(day_file(root, 1), user_id=pa.array(["1"] * 6))


def turn_to_integers(root: Path) -> None:
    rewrite(day_file(root, 2), device=pa.array([1] * 6))


def catalogue_of_strings(root: Path) -> None:
    rewrite(root / "items.parquet", item_id=pa.array(["1", "2", "3", "4"]))


@pytest.mark.parametrize(
    "spoil", [hold_no_rows, turn_to_strings, turn_to_integers, catalogue_of_strings]
)
def test_what_stops_ingest_is_a_fault(root: Path, spoil: Callable[[Path], None]) -> None:
    spoil(root)
    with pytest.raises(UserError) as refused:
        check_span(make_recipe(root), DAYS[:3], None)

    assert str(refused.value) in look(root).faults


def test_what_ingest_takes_is_none(root: Path) -> None:
    """Columns of nulls have no kind, and labels may be of any numbers."""
    rewrite(day_file(root, 0), device=pa.nulls(6), click=pa.array([0.0, 1.0] * 3))
    check_span(make_recipe(root), DAYS[:3], None)

    assert look(root).faults == []


def test_days_that_are_missing_stray_empty_or_not_complete_are_named(root: Path) -> None:
    shutil.rmtree(root / "events" / f"dt={DAYS[1]}")
    (root / "events" / "dt=__HIVE_DEFAULT_PARTITION__").mkdir()
    (root / "events" / f"dt={DAYS[3]}").mkdir()

    found = look(root)
    (fault,) = found.faults
    assert f"dt={DAYS[3]} is empty" in fault
    assert found.warnings == [
        "partitions that are no days are left out: dt=__HIVE_DEFAULT_PARTITION__",
        f"days between others are missing: {DAYS[1]}",
    ]
    (fault,) = look(root, DAYS[1]).faults
    assert f"dt={DAYS[1]} does not exist" in fault
    for day in (0, 2):
        (root / "events" / f"dt={DAYS[day]}" / "_SUCCESS").touch()
    marked = look(root, complete_marker="_SUCCESS")
    assert (marked.faults, marked.days) == ([], [DAYS[0], DAYS[2]])
    assert f"days without _SUCCESS are not there yet: {DAYS[3]}" in marked.warnings


def test_a_root_without_events_is_one_fault_beside_those_of_the_catalogue(root: Path) -> None:
    shutil.rmtree(root / "events")
    (root / "items.parquet").unlink()

    first, second = look(root).faults
    assert "items.parquet does not exist" in first
    assert "has no events/ directory" in second


def test_the_command_ends_with_2_where_there_are_faults(root: Path) -> None:
    recipe = root.parent / "small.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(root).model_dump(mode="json")))

    result = CliRunner().invoke(data_app, ["check", "--recipe", str(recipe)])
    assert (result.exit_code, "ok: days 2024-01-01 .. 2024-01-03" in result.output) == (0, True)
    rewrite(day_file(root, 0), "click")
    day = ["--date", DAYS[0]]
    result = CliRunner().invoke(data_app, ["check", "--recipe", str(recipe), *day])
    assert result.exit_code == 2
    assert "fault" in result.output
    assert "1 fault: days 2024-01-01 .. 2024-01-01" in result.output
