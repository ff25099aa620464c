"""What `backfill` checks before it runs anything."""

from pathlib import Path
from typing import Any

import pytest

from embedding.errors import UserError
from pipeline.command import Command
from tests.pipeline.small_log import DAYS, make_recipe


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Days without content, and a run that must not happen."""
    for day in DAYS:
        (tmp_path / "data" / "events" / f"dt={day}").mkdir(parents=True)

    def run(_: Command, date: str) -> Any:
        raise AssertionError(date)

    monkeypatch.setattr(Command, "_run", run)
    return Command(make_recipe(tmp_path / "data"), tmp_path / "out", publish=lambda *_: None)


def test_backfill_up_to_the_last_day_is_refused_before_the_first_is_run(command: Command) -> None:
    with pytest.raises(UserError, match=rf"{DAYS[3]}: no later day.*can be run is {DAYS[2]}"):
        command.run_days(DAYS[0], DAYS[3])


def test_backfill_runs_the_days_that_have_a_later_one(command: Command) -> None:
    with pytest.raises(AssertionError, match=DAYS[0]):
        command.run_days(DAYS[0], DAYS[2])


def test_backfill_of_days_that_are_not_there_names_those_that_are(command: Command) -> None:
    with pytest.raises(UserError, match=rf"no such day \(it has {DAYS[0]} .. {DAYS[-1]}\)"):
        command.run_days("2025-01-01", "2025-01-02")
