"""What `braid status` shows of dates that cannot be looked into, and of failures."""

import shutil
from pathlib import Path

from rich.console import Console

from pipeline.recipe import write_recipe
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
