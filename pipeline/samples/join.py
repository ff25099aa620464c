"""Join: ingest's events with the columns of their users, items and history items, as samples.

Reads the event files of an ingest artifact, items.parquet and users.parquet. Writes

    samples/dt=YYYY-MM-DD/bucket-NNNN.parquet  the columns of `embedding.samples`, and nothing else
    held_out/dt=YYYY-MM-DD/...                 the same, of items kept from training, if there are
    ids.arrow                                  the ids that features look up (`planning.id_use`)
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding import samples
from embedding.feature_schema import FeatureSchema
from pipeline.config import Recipe
from pipeline.planning.id_use import FILE, IdFacts, IdUse, merge_uses, read_uses, use_of, write_uses
from pipeline.samples.buckets import ROWS_PER_GROUP
from pipeline.samples.columns import history_column
from pipeline.samples.held_out import forget_held_out, is_held_out
from pipeline.samples.join_facts import JoinFacts, item_histories, require_items
from pipeline.samples.join_rows import FeatureSources, Places, join_events
from pipeline.tasks import stream_tasks

SAMPLES = "samples"
HELD_OUT = "held_out"


@dataclass(frozen=True)
class JoinPlan:
    """What every join task needs to know."""

    sources: FeatureSources
    scratch: Path

    @property
    def recipe(self) -> Recipe:
        """Of the run."""
        return self.sources.recipe


@dataclass(frozen=True)
class FileFacts:
    """What became of one event file."""

    file: str
    day: str
    rows: int
    rows_held_out: int
    unknown_users: int
    unknown_items: int
    unknown_history_items: int
    history_events: dict[str, int]
    ids: dict[str, IdFacts]
    """By feature; the ids themselves lie in a file beside the samples until they are merged."""


def join(
    recipe: Recipe,
    ingest_dir: Path,
    scratch: Path,
    progress: Callable[[int, int], None] | None = None,
    codes: Path | None = None,
) -> JoinFacts:
    """Write the samples of all days of `ingest_dir` into `scratch`; needs an initialised Ray.

    Args:
        recipe: names the data root and the features.
        ingest_dir: an ingest artifact made with the same recipe.
        scratch: an empty directory.
        progress: called with rows done and rows in total.
        codes: the file with the codes of items; needed where features follow from codes.

    Raises:
        UserError: a file breaks the data contract, or the catalogue lacks the items of more events
            than the recipe allows.
    """
    (scratch / "ids").mkdir()
    files = sorted((ingest_dir / "events").glob("dt=*/*.parquet"))
    for folder in {file.parent.name for file in files}:
        for part in (SAMPLES, HELD_OUT):
            if part == SAMPLES or recipe.evaluation.held_out_items is not None:
                (scratch / part / folder).mkdir(parents=True)
    file_rows = [pq.read_metadata(file).num_rows for file in files]
    done: list[FileFacts] = []
    features = [feature.name for feature in recipe.features.id_features]
    uses: dict[str, IdUse] = {name: merge_uses([]) for name in features}
    plan = JoinPlan(FeatureSources.load(recipe, codes), scratch)
    for facts in stream_tasks(join_file, files, plan, file_rows):
        path = _ids_path(scratch, facts)
        for name, use in read_uses(path, facts.ids).items():
            uses[name] = merge_uses([uses[name], use])
        path.unlink()
        done.append(facts)
        if progress:
            progress(sum(f.rows for f in done), sum(file_rows))
    (scratch / "ids").rmdir()
    write_uses(uses, scratch / FILE)
    joined = _facts(recipe, done, uses)
    require_items(recipe, joined)
    return joined


def _facts(recipe: Recipe, done: list[FileFacts], uses: dict[str, IdUse]) -> JoinFacts:
    days = sorted({facts.day for facts in done})
    rows = sum(facts.rows for facts in done)
    past = {h.name: sum(f.history_events[h.name] for f in done) for h in recipe.features.histories}
    return JoinFacts(
        rows=rows,
        rows_per_day={day: sum(f.rows for f in done if f.day == day) for day in days},
        rows_held_out=sum(facts.rows_held_out for facts in done),
        unknown_users=sum(facts.unknown_users for facts in done),
        unknown_items=sum(facts.unknown_items for facts in done),
        item_history_events=sum(past[name] for name in item_histories(recipe.features)),
        unknown_history_items=sum(facts.unknown_history_items for facts in done),
        mean_sequence_length={name: count / max(rows, 1) for name, count in past.items()},
        ids={name: use.facts for name, use in uses.items()},
    )


def join_file(path: Path, plan: JoinPlan) -> FileFacts:
    """Write the samples of one event file, row group by row group."""
    folder = path.parent.name
    rows = held_out = 0
    unknown = Counter[str]()
    uses: dict[str, IdUse] = {}
    history_events = dict.fromkeys((h.name for h in plan.recipe.features.histories), 0)
    writers: dict[str, pq.ParquetWriter] = {}
    with pq.ParquetFile(path) as file:
        for events in file.iter_batches(ROWS_PER_GROUP, use_threads=False):
            events = _without_held_out(events, plan)
            places = Places.of(events, plan.sources)
            table = join_events(events, plan.sources, places)
            for part, own in _parts(table, plan).items():
                if part not in writers:
                    output = plan.scratch / part / folder / path.name
                    writers[part] = pq.ParquetWriter(output, own.schema, compression="zstd")
                writers[part].write_table(own, row_group_size=ROWS_PER_GROUP)
                held_out += own.num_rows if part == HELD_OUT else 0
            rows += events.num_rows
            for name, use in _uses(table, plan.recipe.features).items():
                uses[name] = merge_uses([uses[name], use]) if name in uses else use
            for name in history_events:
                history_events[name] += len(events[history_column(name, "item_id")].flatten())
            unknown.update(places.num_unknown)
    for writer in writers.values():
        writer.close()
    facts = FileFacts(
        file=path.name,
        day=folder.removeprefix("dt="),
        rows=rows,
        rows_held_out=held_out,
        unknown_users=unknown["users"],
        unknown_items=unknown["items"],
        unknown_history_items=unknown["histories"],
        history_events=history_events,
        ids={name: use.facts for name, use in uses.items()},
    )
    write_uses(uses, _ids_path(plan.scratch, facts))
    return facts


def _without_held_out(events: pa.RecordBatch, plan: JoinPlan) -> pa.RecordBatch:
    held_out = plan.recipe.evaluation.held_out_items
    return events if held_out is None else forget_held_out(events, plan.sources.columns, held_out)


def _parts(table: pa.Table, plan: JoinPlan) -> dict[str, pa.Table]:
    """The rows to train on, and those of held-out items; a part without rows is left out."""
    held_out = plan.recipe.evaluation.held_out_items
    if held_out is None:
        return {SAMPLES: table}
    mask = is_held_out(table[samples.key_column("item_id")].to_numpy(), held_out)
    parts = {SAMPLES: table.filter(pa.array(~mask)), HELD_OUT: table.filter(pa.array(mask))}
    return {name: part for name, part in parts.items() if part.num_rows}


def _ids_path(scratch: Path, facts: FileFacts) -> Path:
    return scratch / "ids" / f"{facts.day}-{facts.file}.arrow"


def _uses(table: pa.Table, features: FeatureSchema) -> dict[str, IdUse]:
    columns = {f.name: table[samples.sparse_column(f.name)] for f in features.sparse}
    columns |= {f.name: table[samples.sequence_column(f.name)] for f in features.sequences}
    return {
        name: use_of(
            (pc.list_flatten(column) if pa.types.is_list(column.type) else column).to_numpy()
        )
        for name, column in columns.items()
    }
