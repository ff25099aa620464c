"""What `braid status` shows of dates that cannot be looked into, and of failures."""

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.recipe import RECIPE_FILE, write_recipe
from pipeline.stages import failure_file
from pipeline.status import status_table
from tests.pipeline.small_log import DAYS, event, make_recipe, write_catalogue, write_day


def write_runs(folder: Path, num_dates: int) -> Path:
    """An output directory where so many dates have a recipe and nothing else."""
    root, out = folder / "data", folder / "out"
    write_catalogue(root)
    for day in range(4):
        write_day(root, day, [[event(day, 1, 60)]])
    for date in DAYS[:num_dates]:
        (out / date).mkdir(parents=True)
        write_recipe(make_recipe(root), out / date)
    return out


def shown(out: Path) -> list[str]:
    """Lines of the table."""
    console = Console(width=400)
    with console.capture() as captured:
        console.print(status_table(out, lambda *_: None))
    return captured.get().splitlines()


def test_a_date_whose_events_are_gone_does_not_hide_the_others(tmp_path: Path) -> None:
    out = write_runs(tmp_path, 2)
    shutil.rmtree(tmp_path / "data" / "events" / f"dt={DAYS[0]}")

    lines = shown(out)

    (gone,) = [line for line in lines if DAYS[0] in line]
    assert f"--date {DAYS[0]}: the event log has no such day" in gone
    assert [line for line in lines if DAYS[1] in line and "train" in line]


@pytest.mark.parametrize("left", ["", '{"stage": "train"', "[]", '{"stage": "train"}'])
def test_a_failure_that_was_not_written_whole_is_shown_as_one(tmp_path: Path, left: str) -> None:
    out = write_runs(tmp_path, 1)
    failure = failure_file(out / DAYS[0] / "train")
    failure.write_text(left)

    (train,) = [line for line in shown(out) if "train" in line]
    assert "failed" in train
    assert f"{failure} cannot be read" in train


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "holds no mapping"),
        ("name: 'small", "cannot be read"),
        ("name: small\n", "was cut off, or is of another version of Braid (data: required"),
        ("name: small\ninvented: 1\n", "was cut off, or is of another version"),
    ],
)
def test_a_recipe_that_is_damaged_is_said_to_be(tmp_path: Path, text: str, fault: str) -> None:
    out = write_runs(tmp_path, 2)
    (out / DAYS[0] / RECIPE_FILE).write_text(text)

    lines = shown(out)
    (damaged,) = [line for line in lines if DAYS[0] in line]
    assert fault in damaged
    assert "run the date again, which writes it anew" in damaged
    assert [line for line in lines if DAYS[1] in line and "train" in line]
