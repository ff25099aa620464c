from pathlib import Path

import pytest

from embedding.errors import UserError
from pipeline.config import WindowConfig
from pipeline.days import (
    available_days,
    day_files,
    fingerprint,
    require_complete,
    split_days,
    stray_partitions,
)

DAYS = ["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-04", "2024-01-05"]


def test_window_selects_days_up_to_the_date_and_after_it() -> None:
    split = split_days(DAYS, "2024-01-03", WindowConfig(train_days=2, eval_days=1))

    assert split.known == ("2024-01-01", "2024-01-02", "2024-01-03")
    assert split.train == ("2024-01-02", "2024-01-03")
    assert split.evaluation == ("2024-01-04",)


def test_open_window_takes_all_days() -> None:
    split = split_days(DAYS, "2024-01-03", WindowConfig(train_days=None, eval_days=None))

    assert split.train == ("2024-01-01", "2024-01-02", "2024-01-03")
    assert split.evaluation == ("2024-01-04", "2024-01-05")


def test_validation_days_are_the_last_of_the_window_and_are_not_trained() -> None:
    split = split_days(DAYS, "2024-01-04", WindowConfig(train_days=3, validation_days=1))

    assert split.train == ("2024-01-02", "2024-01-03")
    assert split.validation == ("2024-01-04",)
    assert split.evaluation == ("2024-01-05",)


def test_validation_that_leaves_no_day_to_train_on_is_refused() -> None:
    with pytest.raises(UserError, match=r"validation_days=2 holds out all.*run a later date"):
        split_days(DAYS, "2024-01-02", WindowConfig(validation_days=2))
    with pytest.raises(ValueError, match=r"validation_days=2 leaves none of train_days=2"):
        WindowConfig(train_days=2, validation_days=2)


@pytest.mark.parametrize(
    ("day", "message"),
    [
        ("2024-01-05", "no later day to evaluate on; the last date that can be run is 2024-01-04"),
        ("2024-01-09", "no such day .*2024-01-01 .. 2024-01-05.*use 2024-01-05"),
        ("2023-12-31", "no such day"),
        ("tomorrow", "'tomorrow' is not a day"),
        ("20240103", "--date: '20240103' is a day, but must be written as 2024-01-03"),
        ("2024-W01-3", "must be written as 2024-01-03"),
    ],
)
def test_day_that_cannot_be_run_names_one_that_can(day: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_days(DAYS, day, WindowConfig())


def test_directory_without_events_says_how_to_get_some(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="braid data import"):
        available_days(tmp_path)


@pytest.mark.parametrize("name", ["20240107", "2024-W01-7", "__HIVE_DEFAULT_PARTITION__"])
def test_partitions_that_are_no_days_are_left_out_by_name(tmp_path: Path, name: str) -> None:
    """Everything downstream looks for `dt=YYYY-MM-DD`."""
    stray = tmp_path / "events" / f"dt={name}"
    stray.mkdir(parents=True)
    with pytest.raises(UserError, match=f"has no day; .*there are dt={name}"):
        available_days(tmp_path)
    (tmp_path / "events" / f"dt={DAYS[0]}").mkdir()

    assert available_days(tmp_path) == DAYS[:1]
    assert stray_partitions(tmp_path) == [stray.name]


def test_a_day_without_its_marker_is_not_there_yet(tmp_path: Path) -> None:
    for day in DAYS[:3]:
        (tmp_path / "events" / f"dt={day}").mkdir(parents=True)
    with pytest.raises(UserError, match=r"none of the 3 days .* holds a file _SUCCESS"):
        available_days(tmp_path, "_SUCCESS")
    for day in DAYS[:2]:
        (tmp_path / "events" / f"dt={day}" / "_SUCCESS").touch()

    assert available_days(tmp_path, "_SUCCESS") == DAYS[:2]
    require_complete(tmp_path, DAYS[1], "_SUCCESS")
    require_complete(tmp_path, DAYS[4], "_SUCCESS")  # not there at all: another sentence
    with pytest.raises(UserError, match=rf"--date {DAYS[2]}: .*holds no file _SUCCESS .*wait"):
        require_complete(tmp_path, DAYS[2], "_SUCCESS")


def test_fingerprint_follows_content_and_names(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("x")
    before = fingerprint([file])

    file.write_text("xy")

    assert fingerprint([file]) != before
    assert fingerprint([file]) == fingerprint([file])


def test_files_that_a_writer_has_not_finished_are_no_files_of_a_day(tmp_path: Path) -> None:
    folder = tmp_path / "events" / f"dt={DAYS[0]}"
    folder.mkdir(parents=True)
    for name in ("part-1.parquet", "part-0.parquet", ".part-2.parquet", "_part-3.parquet", "x.txt"):
        (folder / name).touch()

    found = day_files(tmp_path, DAYS[:2])
    assert [path.name for path in found] == ["part-0.parquet", "part-1.parquet"]


def test_a_file_that_goes_while_it_is_looked_at_is_said_with_the_remedy(tmp_path: Path) -> None:
    gone = tmp_path / "part-0.parquet"
    with pytest.raises(UserError, match=rf"{gone} went while .* being written; run .* again"):
        fingerprint([gone])
