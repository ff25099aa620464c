"""Days that are missing or came late: what a run says before it trains, and does not stop for.

A run trains on the days after the last one that its parent trained on. So a day, or a file of a
day, that comes after that is in histories and counts, and in no model that goes on from there.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

from pipeline.artifacts import read_manifest
from pipeline.days import Split, named, stray_partitions
from pipeline.event_files import DayFiles, KnownDays
from pipeline.train_facts import TrainFacts


@dataclass(frozen=True)
class Ancestry:
    """The trainings that a run goes on from."""

    files: dict[str, DayFiles]
    """By day, of all days that any of them trained on."""
    run_of: dict[str, str]
    """Date of the latest training that took each day."""
    is_whole: bool
    """Whether it is known down to the one that started from drawn values."""

    @classmethod
    def of(cls, out: Path, parent: str | None) -> "Ancestry":
        """Read it from the artifacts that are there."""
        files: dict[str, DayFiles] = {}
        runs: dict[str, str] = {}
        while parent is not None:
            manifest = read_manifest(out / parent / "train", TrainFacts)
            if manifest is None:
                return cls(files, runs, is_whole=False)
            for day in manifest.facts.days:
                files.setdefault(day, manifest.facts.day_files[day])
                runs.setdefault(day, parent)
            parent = manifest.facts.parent
        return cls(files, runs, is_whole=True)


def day_warnings(
    known: KnownDays,
    split: Split,
    training: Sequence[str],
    ancestry: Ancestry,
    left: Collection[str] = (),
) -> tuple[str, ...]:
    """Sentences on the days of one run.

    Args:
        known: the files of the event log.
        split: days of the run.
        training: those it trains on.
        ancestry: what it goes on from.
        left: days of spans that stay as they are though their files changed (`Spans.kept`): to run
            them again takes in nothing, so what is said of the spans is all there is to say.
    """
    return (
        *_stray(known.root),
        *_gaps(split, training, ancestry),
        *_left_out(split, ancestry),
        *_late_days(split, ancestry, left),
        *_late_files(known, split, ancestry, left),
    )


def missing_days(days: Sequence[str]) -> list[str]:
    """Calendar days between the first and the last of some that are not among them."""
    found = {date.fromisoformat(day) for day in days}
    if not found:
        return []
    first, last = min(found), max(found)
    every = (first + timedelta(days=i) for i in range((last - first).days))
    return [day.isoformat() for day in every if day not in found]


def _stray(root: Path) -> Iterator[str]:
    strays = stray_partitions(root)
    if strays:
        yield (
            f"{root / 'events'} has partitions that are no days and are left out: "
            f"{named(strays)}; a day is written dt=YYYY-MM-DD"
        )


def _gaps(split: Split, training: Sequence[str], ancestry: Ancestry) -> Iterator[str]:
    before = max(ancestry.files, default=None)
    days = [*([] if before is None else [before]), *training, *split.validation]
    missing = [day for day in missing_days(days) if day not in split.known]
    if missing:
        yield (
            f"the event log has no {named(missing)} between {days[0]} and {days[-1]}, which this "
            "run trains on; a later delivery is not trained on by itself"
        )
    ahead = missing_days([days[-1], *split.evaluation])
    if ahead:
        yield (
            f"the model of {days[-1]} is evaluated on {named(split.evaluation)}, as the event log "
            f"has no {named(ahead)}"
        )


def _left_out(split: Split, ancestry: Ancestry) -> Iterator[str]:
    """Days of the log between what was trained on before and the window: nobody comes back here."""
    window = (*split.train, *split.validation)
    before = max(ancestry.files, default=window[0])
    left = [day for day in split.known if before < day < window[0]]
    if left:
        whole = sum(day > before for day in split.known)
        yield (
            f"window.train_days={len(window)} leaves out {named(left)}, which no model that this "
            "run goes on from was trained on, and later runs go on after them; to train on them, "
            f"run this date again with --set window.train_days={whole}"
        )


def _late_days(split: Split, ancestry: Ancestry, left: Collection[str]) -> Iterator[str]:
    if not ancestry.files:
        return
    known, last = ("" if ancestry.is_whole else min(ancestry.files)), max(ancestry.files)
    came = [day for day in split.train if known <= day < last and day not in ancestry.files]
    late = [day for day in came if day not in left]
    if late:
        after = min(day for day in ancestry.files if day > late[0])
        yield (
            f"no model that this run goes on from was trained on {named(late)}, and neither is "
            f"this one: {_remedy(ancestry.run_of[after])}"
        )


def _late_files(
    known: KnownDays, split: Split, ancestry: Ancestry, left: Collection[str]
) -> Iterator[str]:
    trained = (day for day in split.train if day in ancestry.files)
    learned = {day: ancestry.files[day] for day in trained if day not in left}
    changed = [day for day, files in learned.items() if not known.are(day, files)]
    if changed:
        yield (
            f"the files of {named(changed)} have changed since models that this run goes on from "
            f"were trained on them: {_remedy(ancestry.run_of[changed[0]])}"
        )


def _remedy(run: str) -> str:
    return f"to train on them, run the days from {run} on again (braid backfill)"
