"""`OUT/<date>/.pruned.json`: that a run is no longer whole on purpose, so that nobody repeats it.

`braid prune` leaves it in all runs but the latest, `braid status` shows it in place of stages that
are missing or stale, and a new run of the date removes it.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from embedding.config import StrictConfig
from pipeline.artifacts import read_manifest

PRUNED = ".pruned.json"


class PrunedNote(StrictConfig):
    """Version 1."""

    schema_version: Literal[1] = 1
    at: str
    """UTC, ISO 8601."""


def note_pruned(directory: Path) -> None:
    """Say that the run of a date was pruned, if it does not say so already.

    Not durably: it is one for every run, and what a crash leaves of it is no note.
    """
    if what_was_pruned(directory) is None:
        note = PrunedNote(at=datetime.now(UTC).isoformat(timespec="seconds"))
        (directory / PRUNED).write_text(note.model_dump_json())


def forget_pruned(directory: Path) -> None:
    """A date that is run again is whole when it is done."""
    (directory / PRUNED).unlink(missing_ok=True)


def what_was_pruned(directory: Path) -> str | None:
    """A sentence on a run that was pruned; None: it was not."""
    try:
        note = PrunedNote.model_validate_json((directory / PRUNED).read_text())
    except (OSError, ValidationError):
        return None
    if read_manifest(directory / "train") is None:
        return f"pruned {note.at}: of this run its figures are kept"
    return (
        f"pruned {note.at}: the model is kept, to start from or to return to; there is nothing to "
        "run again"
    )
