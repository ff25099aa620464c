"""What a run says of days that are missing, came late or were written anew."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.config import WindowConfig
from pipeline.day_warnings import Ancestry, day_warnings, missing_days
from pipeline.days import available_days, split_days
from pipeline.event_files import DayFiles, KnownDays
from tests.pipeline.small_models import write_manifest
from tests.pipeline.stage_facts import trained


class Log:
    """Days, and runs that trained on them."""

    def __init__(self, folder: Path) -> None:
        self.root, self.out = folder / "data", folder / "out"

    def deliver(self, *numbers: int) -> None:
        """A file of each day, or one more of a day that is there."""
        for number in numbers:
            folder = self.root / "events" / f"dt={day(number)}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"part-{len(list(folder.iterdir()))}.parquet").touch()

    def train(self, number: int, numbers: Sequence[int], parent: int | None = None) -> None:
        days = [day(i) for i in numbers]
        start = None if parent is None else day(parent)
        facts = trained(days, start, day_files={d: DayFiles.of(self.root, d) for d in days})
        write_manifest(self.out / day(number) / "train", "i", facts)

    def said(
        self, number: int, *, parent: int | None = None, left: Sequence[int] = (), **window: int
    ) -> list[str]:
        split = split_days(available_days(self.root), day(number), WindowConfig(**window))
        start = None if parent is None else day(parent)
        ancestry = Ancestry.of(self.out, start)
        last = max(ancestry.files, default="")
        training = [d for d in split.train if d > last]
        known = KnownDays(self.out, self.root, lambda _: None)
        return list(day_warnings(known, split, training, ancestry, [day(i) for i in left]))


def day(number: int) -> str:
    return f"2024-01-{number:02d}"


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


def test_days_one_after_the_other_need_no_word(log: Log) -> None:
    log.deliver(1, 2, 3)
    assert log.said(2) == []
    log.train(1, [1])
    assert log.said(2, parent=1) == []


def test_missing_days_are_those_of_the_calendar() -> None:
    assert missing_days([]) == []
    assert missing_days(["2024-02-27", "2024-03-02", "2024-02-28"]) == ["2024-02-29", "2024-03-01"]


def test_gaps_in_what_is_trained_on_are_named(log: Log) -> None:
    log.deliver(1, 3, 4)
    assert log.said(3) == [
        f"the event log has no {day(2)} between {day(1)} and {day(3)}, which this run trains on; a "
        "later delivery is not trained on by itself"
    ]
    log.train(1, [1])
    (sentence,) = log.said(3, parent=1)
    assert f"no {day(2)} between" in sentence, "also between the parent's last day and the first"


def test_days_that_fall_out_of_the_window_before_they_were_trained_on_are_named(log: Log) -> None:
    log.deliver(1, 2, 3, 5, 6, 7, 8)
    log.train(1, [1])

    assert log.said(7, parent=1, train_days=2) == [
        f"the event log has no {day(4)} between {day(1)} and {day(7)}, which this run trains on; a "
        "later delivery is not trained on by itself",
        f"window.train_days=2 leaves out {day(2)}, {day(3)}, {day(5)}, which no model that this "
        "run goes on from was trained on, and later runs go on after them; to train on them, run "
        "this date again with --set window.train_days=5",
    ]
    (sentence,) = log.said(7, parent=1, train_days=5)
    assert f"the event log has no {day(4)}" in sentence
    assert log.said(7, train_days=2) == [], "a cold start has nothing before its window"


def test_an_evaluation_day_that_is_not_the_next_one_is_named(log: Log) -> None:
    log.deliver(1, 4)
    assert log.said(1) == [
        f"the model of {day(1)} is evaluated on {day(4)}, as the event log has no {day(2)}, "
        f"{day(3)}"
    ]


def test_a_day_that_came_after_its_turn_is_named_with_the_remedy(log: Log) -> None:
    log.deliver(1, 3, 4, 5)
    log.train(1, [1])
    log.train(3, [3], parent=1)
    log.deliver(2)

    assert log.said(4, parent=3) == [
        f"no model that this run goes on from was trained on {day(2)}, and neither is this one: to "
        f"train on them, run the days from {day(3)} on again (braid backfill)"
    ]
    assert log.said(4, parent=3, train_days=2) == [], "outside of the window"
    assert log.said(4) == [], "a cold start trains on all of them"


def test_a_file_that_came_after_its_day_was_trained_is_named(log: Log) -> None:
    log.deliver(1, 2, 3, 4, 5)
    log.train(2, [1, 2])
    log.train(3, [3], parent=2)
    log.deliver(2)

    assert log.said(4, parent=3) == [
        f"the files of {day(2)} have changed since models that this run goes on from were trained "
        f"on them: to train on them, run the days from {day(2)} on again (braid backfill)"
    ]


def test_days_of_spans_that_stay_are_left_to_what_is_said_of_the_spans(log: Log) -> None:
    """To run them again, which is the remedy for others, takes nothing in."""
    log.deliver(1, 3, 4, 5)
    log.train(1, [1])
    log.train(3, [3], parent=1)
    log.deliver(1, 2, 3)

    assert len(log.said(4, parent=3)) == 2
    assert log.said(4, parent=3, left=[1, 2, 3]) == []
    (sentence,) = log.said(4, parent=3, left=[1, 2])
    assert f"the files of {day(3)} have changed" in sentence


def test_days_before_what_is_known_of_the_parents_are_not_blamed(log: Log) -> None:
    """Their artifacts were removed, as they may be."""
    log.deliver(1, 2, 3, 4, 5)
    log.train(3, [3], parent=2)
    assert not Ancestry.of(log.out, day(3)).is_whole
    assert log.said(4, parent=3) == []


def test_partitions_that_are_no_days_are_named(log: Log) -> None:
    log.deliver(1, 2)
    (log.root / "events" / "dt=__HIVE_DEFAULT_PARTITION__").mkdir()
    (sentence,) = log.said(1)
    assert "are left out: dt=__HIVE_DEFAULT_PARTITION__; a day is written dt=YYYY-MM-DD" in sentence
