"""Ingest: the event log of a span of days, validated, with point-in-time histories.

Reads events/dt=*/, items.parquet and users.parquet of the data root, and the ingest artifact of the
span before. Writes an artifact directory:

    events/dt=YYYY-MM-DD/bucket-NNNN.parquet  events by time; history:<name>:<column> lists
    state/bucket-NNNN.parquet                 latest history events of every user, for the next span
    quarantine/part-NNNNNN.parquet            rows that break the contract, with reason and source
    quarantine/repeats-bucket-NNNN.parquet    rows that repeat an earlier event
    item_counts.parquet, user_counts.parquet  id, events, positives, first_day; all spans so far
    ingest.json                               `IngestState`

Two streaming passes over the span, and never over earlier ones: split by user, then sort within a
bucket of users. The bytes written depend on the data and the recipe only.
"""

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.feature_schema import HistoryConfig
from pipeline.artifacts import read_manifest
from pipeline.config import Recipe
from pipeline.event_files import DayFiles
from pipeline.samples.buckets import (
    REPEATED,
    BucketFacts,
    BucketPlan,
    EarlierState,
    bucket_file,
    build_bucket,
    merge_counts,
)
from pipeline.samples.catalogue import catalogue_kinds, check_catalogue
from pipeline.samples.column_kinds import merged_kinds
from pipeline.samples.columns import ColumnKind, EventColumns
from pipeline.samples.contract import CatalogueIds, EventFile, event_files
from pipeline.samples.ingest_facts import IngestFacts, LabelFacts
from pipeline.samples.partition import (
    PartitionFacts,
    PartitionPlan,
    partition_chunk,
    plan_chunks,
)
from pipeline.spans import first_day_held
from pipeline.tasks import stream_tasks

logger = logging.getLogger(__name__)

ROWS_PER_BUCKET = 1 << 20
STATE_FILE = "ingest.json"

Progress = Callable[[int, int], None]
"""Called with what is done and the total."""


class IngestState(StrictConfig):
    """How an ingest artifact can be continued; version 1."""

    schema_version: Literal[1] = 1
    last_day: str
    num_buckets: int
    histories: tuple[HistoryConfig, ...]
    history_values: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class CheckedSpan:
    """Days of the event log whose files, catalogue and earlier state fit the recipe."""

    days: tuple[str, ...]
    previous: Path | None
    """The ingest artifact that ends before the days."""
    earlier: EarlierState | None
    """The state of `previous`."""
    day_files: dict[str, DayFiles]
    files: list[EventFile]
    kinds: dict[str, ColumnKind]
    """Of the id columns of all files, and of those before `days`."""
    known: CatalogueIds
    columns: EventColumns
    num_buckets: int

    @property
    def num_rows(self) -> int:
        """Events of all files."""
        return sum(file.num_rows for file in self.files)


def check_span(
    recipe: Recipe,
    days: Sequence[str],
    previous: Path | None,
    read: Callable[[str], DayFiles] | None = None,
) -> CheckedSpan:
    """Check everything that can be said without reading the events: it needs no Ray.

    Args:
        recipe: names the data root, features and tasks.
        days: consecutive days of the event log, in order.
        previous: the ingest artifact that ends before the days, or None at the beginning.
        read: gives the event files of a day; by default they are read.

    Raises:
        UserError: a file breaks the data contract, or `previous` cannot be continued.
    """
    if list(days) != sorted(set(days)) or not days:
        raise UserError(f"the span {days} must be at least one day, in order and without repeats")
    earlier = _earlier_state(recipe, days[0], previous)
    root = recipe.data.root
    columns = EventColumns.of(recipe)
    # Before they are listed: a file that comes after that is one that the artifact does not hold.
    found = {day: read(day) if read else DayFiles.of(root, day) for day in days}
    files = [file for day in days for file in event_files(root, day, columns)]
    known = check_catalogue(root, recipe.features)
    written = [(file.path, file.kinds) for file in files]
    kinds = merged_kinds(
        [*_earlier_kinds(previous, columns), *written, *catalogue_kinds(root, known)]
    )
    lists = frozenset(name for name in columns.ids if kinds[name].is_list)
    present = frozenset().union(*(file.column_names for file in files))
    oracles = {task: name for task, name in columns.oracles.items() if name in present}
    num_rows = sum(file.num_rows for file in files) * columns.row_weight
    if earlier is not None:  # a bucket holds what is kept of its users, too
        num_rows += earlier.count_rows()
    # Doubling keeps the state of an earlier span aligned with the new buckets.
    num_buckets = recipe.data.user_buckets
    while num_buckets * ROWS_PER_BUCKET < num_rows:
        num_buckets *= 2
    return CheckedSpan(
        days=tuple(days),
        previous=previous,
        earlier=earlier,
        day_files=found,
        files=files,
        kinds=kinds,
        known=known,
        columns=columns.model_copy(update={"oracles": oracles, "lists": lists}),
        num_buckets=num_buckets,
    )


def ingest(
    recipe: Recipe, checked: CheckedSpan, scratch: Path, progress: Progress | None = None
) -> IngestFacts:
    """Validate the events of a span, give each its histories, and write into `scratch`.

    Needs an initialised Ray.

    Args:
        recipe: the one the span was checked for.
        checked: the span.
        scratch: an empty directory.
        progress: called with rows done and rows in total (each row counts for both passes).

    Raises:
        UserError: more events of a day break the data contract than the recipe allows.
    """
    parts = scratch / "parts"
    for folder in ("parts", "state", "quarantine", *(f"events/dt={day}" for day in checked.days)):
        (scratch / folder).mkdir(parents=True)
    report = _RowProgress(2 * checked.num_rows, progress)
    partitioned = _partition(recipe, checked, parts, scratch / "quarantine", report)
    plan = BucketPlan(
        columns=checked.columns,
        histories=tuple(h for h in recipe.features.histories if h.columns is None),
        days=checked.days,
        num_buckets=checked.num_buckets,
        parts=parts,
        output=scratch,
        earlier=checked.earlier,
    )
    buckets: list[BucketFacts] = []
    even = [checked.num_rows // checked.num_buckets] * checked.num_buckets
    for facts in stream_tasks(build_bucket, range(checked.num_buckets), plan, even):
        buckets.append(facts)
        report.add(facts.num_rows + facts.repeats)
    quarantined = _require_sound(recipe, checked, partitioned, buckets)
    counts = {key: _write_counts(key, plan, checked.previous) for key in ("item_id", "user_id")}
    shutil.rmtree(parts)
    _write_state(recipe, plan, scratch)
    return _facts(checked, partitioned, buckets, counts, quarantined)


class _RowProgress:
    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total, self.done, self.progress = total, 0, progress

    def add(self, rows: int) -> None:
        self.done += rows
        if self.progress:
            self.progress(self.done, self.total)


def _earlier_state(recipe: Recipe, first: str, previous: Path | None) -> EarlierState | None:
    if previous is None:
        return None
    path = previous / STATE_FILE
    if not path.exists():
        raise UserError(f"{previous} is no ingest artifact: it lacks {STATE_FILE}; ingest it again")
    state = IngestState.model_validate_json(path.read_text())
    if first <= state.last_day:
        raise UserError(
            f"{previous} already holds events up to {state.last_day}, so ingest cannot continue it "
            f"with {first}; choose later days or another earlier artifact"
        )
    values = EventColumns.of(recipe).history_values
    if (state.histories, state.history_values) != (recipe.features.histories, values):
        raise UserError(
            f"{previous} keeps other histories than the recipe's features.histories and sequences "
            "ask for; ingest again from the first day"
        )
    return EarlierState(previous / "state", state.num_buckets)


def _earlier_kinds(
    previous: Path | None, columns: EventColumns
) -> list[tuple[str, dict[str, ColumnKind]]]:
    """What id columns hold in the events before a span; those of labels are alike on all days."""
    manifest = None if previous is None else read_manifest(previous, IngestFacts)
    if manifest is None:
        return []
    facts = manifest.facts
    kinds = {n: kind for n, kind in facts.event_columns.items() if n not in columns.labels}
    return [(f"the events up to {facts.days[-1]} (ingested in {previous})", kinds)]


def _partition(
    recipe: Recipe, span: CheckedSpan, parts: Path, quarantine: Path, report: _RowProgress
) -> list[PartitionFacts]:
    plan = PartitionPlan(span.columns, span.known, span.num_buckets, parts, quarantine)
    found = []
    chunks = plan_chunks(span.files, span.columns.row_weight)
    rows = [chunk.num_rows for chunk in chunks]
    for facts in stream_tasks(partition_chunk, chunks, plan, rows):
        found.append(facts)
        report.add(facts.rows_in)
    found.sort(key=lambda facts: facts.index)
    _require_sound(recipe, span, found, [])
    return found


def _require_sound(
    recipe: Recipe,
    span: CheckedSpan,
    partitioned: list[PartitionFacts],
    buckets: list[BucketFacts],
) -> dict[str, int]:
    """Rows in quarantine by reason.

    Raises:
        UserError: they are more of a day than the recipe allows: in daily use a span is one day,
            and among many others a day that is all wrong would not show.
    """
    bad = {day: Counter[str]() for day in span.days}
    examples: dict[str, str] = {}
    for part in partitioned:
        bad[part.day].update(part.quarantined)
        if part.example is not None:
            examples.setdefault(part.day, part.example)
    for bucket in sorted(buckets, key=lambda facts: facts.bucket):
        for day, (repeats, example) in bucket.repeats_of_days.items():
            bad[day][REPEATED] += repeats
            examples.setdefault(day, example)
    limit = recipe.data.max_quarantined_share
    rows_of_days = Counter[str]()
    for file in span.files:
        rows_of_days[file.day] += file.num_rows
    for day, counts in bad.items():
        num_rows = rows_of_days[day]
        if counts.total() > limit * num_rows:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())
            raise UserError(
                f"{counts.total()} of {num_rows} events of {day} break the data contract, more "
                f"than data.max_quarantined_share={limit} allows ({reasons}), first in "
                f"{examples[day]}; correct the log or raise the limit"
            )
    all_bad = sum(bad.values(), Counter[str]())
    if all_bad and buckets:
        logger.warning("%d of %d events are in quarantine", all_bad.total(), span.num_rows)
    return dict(all_bad)


def _write_counts(key: str, plan: BucketPlan, previous: Path | None) -> int:
    files = [plan.parts / f"{key}-{bucket_file(bucket)}" for bucket in range(plan.num_buckets)]
    name = f"{key.removesuffix('_id')}_counts.parquet"
    if previous is not None:
        files.append(previous / name)
    counts = merge_counts(map(pq.read_table, files), key)
    pq.write_table(counts, plan.output / name, compression="zstd")
    return int(counts.num_rows)


def _write_state(recipe: Recipe, plan: BucketPlan, scratch: Path) -> None:
    state = IngestState(
        last_day=plan.days[-1],
        num_buckets=plan.num_buckets,
        histories=recipe.features.histories,
        history_values=plan.columns.history_values,
    )
    (scratch / STATE_FILE).write_text(state.model_dump_json(indent=2))


def _facts(
    span: CheckedSpan,
    partitioned: list[PartitionFacts],
    buckets: list[BucketFacts],
    counts: dict[str, int],
    quarantined: dict[str, int],
) -> IngestFacts:
    rows_out = span.num_rows - sum(quarantined.values())
    days = {day: sum(b.rows_per_day[day] for b in buckets) for day in buckets[0].rows_per_day}
    histories = buckets[0].history_events
    return IngestFacts(
        days=span.days,
        previous=None if span.previous is None else span.previous.parent.name,
        day_files=span.day_files,
        rows_in=span.num_rows,
        rows_out=rows_out,
        quarantined=quarantined,
        rows_per_day=days,
        labels={
            name: LabelFacts(
                observed=sum(f.labels[name][0] for f in partitioned)
                - sum(f.repeated_labels[name][0] for f in buckets),
                positives=sum(f.labels[name][1] for f in partitioned)
                - sum(f.repeated_labels[name][1] for f in buckets),
            )
            for name in span.columns.labels
        },
        mean_history_length={
            name: sum(b.history_events[name] for b in buckets) / max(rows_out, 1)
            for name in histories
        },
        num_items=counts["item_id"],
        num_users=counts["user_id"],
        num_buckets=span.num_buckets,
        first_day=first_day_held(span.days, span.previous),
        event_columns=span.kinds,
    )
