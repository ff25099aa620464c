"""What ingest counts; imports nothing heavy."""

from embedding.config import StrictConfig
from pipeline.artifacts import StageFacts
from pipeline.event_files import DayFiles
from pipeline.samples.columns import ColumnKind


class LabelFacts(StrictConfig):
    """How often a task was observed and positive."""

    observed: int
    positives: int

    @property
    def rate(self) -> float:
        """Share of positives among the observed rows; 0 if there are none."""
        return self.positives / self.observed if self.observed else 0.0


class IngestFacts(StageFacts):
    """What ingest read and wrote."""

    days: tuple[str, ...]
    """Of the span."""
    previous: str | None
    """Last day of the span that it continues."""
    day_files: dict[str, DayFiles]
    """Of each of the days, as they were before any of them was read."""
    rows_in: int
    rows_out: int
    quarantined: dict[str, int]
    """Rows put aside, by reason."""
    rows_per_day: dict[str, int]
    labels: dict[str, LabelFacts]
    """By label column."""
    mean_history_length: dict[str, float]
    num_items: int
    num_users: int
    """Distinct ids in all events so far."""
    num_buckets: int
    first_day: str
    """Of all events so far: pruning deletes the artifacts that would tell."""
    event_columns: dict[str, ColumnKind]
    """What the id columns of the log hold, in all events so far."""
