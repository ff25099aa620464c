"""Which days a dataset has, and which of them a run trains and evaluates."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from embedding.errors import UserError
from pipeline.config import WindowConfig

PARTITION = "dt="


def available_days(root: Path, marker: str | None = None) -> list[str]:
    """Days with a partition under `root/events`, ascending.

    Args:
        root: data root.
        marker: name of the file that a complete partition holds; None: all are complete.

    Raises:
        UserError: There is no such dataset.
    """
    events = root / "events"
    if not events.is_dir():
        raise UserError(
            f"data.root={root} has no events/ directory; create it with `braid data import ...` or "
            "`braid data synth`, or point --set data.root=DIR at a dataset"
        )
    delivered = [name for name in _partitions(root) if _is_day(name)]
    if not delivered:
        strays = stray_partitions(root)
        found = f" (there are {', '.join(strays[:3])})" if strays else ""
        raise UserError(f"{events} has no day; its partitions are directories dt=YYYY-MM-DD{found}")
    days = [day for day in delivered if marker is None or is_complete(root, day, marker)]
    if not days:
        raise UserError(
            f"none of the {len(delivered)} days in {events} holds a file {marker}, so none is "
            "complete; write it where a delivery ends, or set data.complete_marker to null"
        )
    return days


def is_complete(root: Path, day: str, marker: str) -> bool:
    """Whether the partition of a day holds the file that ends its delivery."""
    return (root / "events" / f"{PARTITION}{day}" / marker).exists()


def named(days: Sequence[str]) -> str:
    """Some days for a sentence, ascending; of many the first and the last."""
    return ", ".join(days) if len(days) <= 4 else f"{days[0]} .. {days[-1]} ({len(days)} in all)"


def run_command(out: Path, day: str) -> str:
    """The command that runs a day again, for a sentence."""
    return f"`braid run --date {day} --out {out}` with this recipe"


def stray_partitions(root: Path) -> list[str]:
    """Names of partitions that are no days, which nothing reads."""
    return [f"{PARTITION}{name}" for name in _partitions(root) if not _is_day(name)]


def _partitions(root: Path) -> list[str]:
    paths = (root / "events").glob(f"{PARTITION}*")
    return sorted(path.name.removeprefix(PARTITION) for path in paths)


def _is_day(name: str) -> bool:
    try:
        return date.fromisoformat(name).isoformat() == name
    except ValueError:
        return False


def parse_day(text: str, where: str) -> date:
    """A day from YYYY-MM-DD.

    Raises:
        UserError: It is not one.
    """
    try:
        day = date.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"{where}: {text!r} is not a day; write it as YYYY-MM-DD") from error
    # ISO also writes days as 20240107 and 2024-W02-1: no partition is found by such a name.
    if day.isoformat() != text:
        raise UserError(f"{where}: {text!r} is a day, but must be written as {day.isoformat()}")
    return day


@dataclass(frozen=True)
class Split:
    """Days of one run."""

    known: tuple[str, ...]
    """All days up to and including the run's date."""
    train: tuple[str, ...]
    validation: tuple[str, ...]
    """The days between those to train on and those to evaluate on."""
    evaluation: tuple[str, ...]


def require_complete(root: Path, day: str, marker: str | None) -> None:
    """Refuse the date of a run whose partition is there and not complete.

    Raises:
        UserError: names the file that it lacks.
    """
    folder = root / "events" / f"{PARTITION}{day}"
    if marker is not None and folder.is_dir() and not is_complete(root, day, marker):
        raise UserError(
            f"--date {day}: {folder} holds no file {marker} (data.complete_marker), so its "
            "delivery is not complete; wait for it, or write the file if it is"
        )


def split_days(days: Sequence[str], day: str, window: WindowConfig) -> Split:
    """Days to train, to validate and to evaluate on for a run of `day`.

    Raises:
        UserError: No day to train on, or none after `day` to evaluate on.
    """
    parse_day(day, "--date")
    known = [other for other in days if other <= day]
    later = [other for other in days if other > day]
    if not known or known[-1] != day:
        near = [other for other in days if other <= day][-1:] or list(days[:1])
        raise UserError(
            f"--date {day}: the event log has no such day (it has {days[0]} .. {days[-1]}); "
            f"use {near[0]}, or import that day first"
        )
    if not later:
        last = f"the last date that can be run is {known[-2]}" if len(known) > 1 else "add a day"
        raise UserError(f"--date {day}: no later day to evaluate on; {last}")
    train = known if window.train_days is None else known[-window.train_days :]
    first_held_out = len(train) - window.validation_days
    if first_held_out < 1:
        raise UserError(
            f"--date {day}: window.validation_days={window.validation_days} holds out all of "
            f"{train[0]} .. {train[-1]}, which leaves no day to train on; lower it, or run a later "
            "date"
        )
    evaluation = later if window.eval_days is None else later[: window.eval_days]
    return Split(
        known=tuple(known),
        train=tuple(train[:first_held_out]),
        validation=tuple(train[first_held_out:]),
        evaluation=tuple(evaluation),
    )


def fingerprint(paths: Sequence[Path]) -> str:
    """Changes when a file appears, disappears, or is rewritten (name, size, mtime).

    Raises:
        UserError: a file went while it was looked at.
    """
    digest = hashlib.sha256()
    for path in sorted(paths):
        try:
            stat = path.stat()
        except FileNotFoundError as error:
            raise vanished(path) from error
        digest.update(f"{path.name}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def vanished(path: Path) -> UserError:
    """What to say of a file that was listed and is gone."""
    return UserError(
        f"{path} went while it was looked at: its folder is being written; run the same command "
        "again once that is done, and have writers put unfinished files under a name that begins "
        "with . or _ (or set data.complete_marker)"
    )


def day_files(root: Path, days: Sequence[str]) -> list[Path]:
    """Parquet files of these days' events, by day and name; hidden ones are not read."""
    return [
        path
        for day in days
        for path in sorted((root / "events" / f"{PARTITION}{day}").glob("*.parquet"))
        if not path.name.startswith((".", "_"))
    ]


def catalogue_files(root: Path) -> list[Path]:
    """`items.parquet` and `users.parquet`, where they exist."""
    return [path for path in (root / "items.parquet", root / "users.parquet") if path.exists()]


@dataclass(frozen=True)
class Span:
    """Days that one ingest artifact covers; its directory is named after the last one."""

    days: tuple[str, ...]
    previous: str | None
    """Last day of the span whose user state this one continues."""
