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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding import samples
from embedding.config import FeatureSchema, SequenceFeature, Source, SparseFeature
from embedding.raw_ids import Int64Array, ids_or_missing
from multimodal.codes.schema import without_codes
from pipeline.codes.columns import code_columns
from pipeline.codes.features import ItemCodes
from pipeline.config import Recipe
from pipeline.planning.id_use import FILE, IdFacts, IdUse, merge_uses, read_uses, use_of, write_uses
from pipeline.samples.buckets import ROWS_PER_GROUP
from pipeline.samples.catalogue import check_catalogue
from pipeline.samples.columns import EventColumns, history_column, source_columns
from pipeline.samples.held_out import forget_held_out, is_held_out
from pipeline.samples.histories import normal_lists
from pipeline.samples.join_facts import JoinFacts, item_histories, require_items
from pipeline.samples.lookup import (
    EntityColumns,
    IdLists,
    floats,
    id_column,
    load_entities,
    no_entities,
    transform_dense,
)
from pipeline.tasks import stream_tasks

SAMPLES = "samples"
HELD_OUT = "held_out"

_ENTITY_KEYS: dict[Source, str] = {"items": "item_id", "users": "user_id"}


@dataclass(frozen=True)
class JoinPlan:
    """What every join task needs to know."""

    recipe: Recipe
    columns: EventColumns
    entities: dict[Source, EntityColumns]
    """`items` and `users`."""
    codes: ItemCodes | None
    """Where features follow from codes."""
    scratch: Path


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
    for facts in stream_tasks(join_file, files, plan_join(recipe, scratch, codes), file_rows):
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


def plan_join(recipe: Recipe, scratch: Path, codes: Path | None = None) -> JoinPlan:
    """Load the feature columns of items and users, and the codes of items.

    Raises:
        UserError: a file breaks the data contract.
    """
    check_catalogue(recipe.data.root, recipe.features)  # ingest may have checked another one
    entities: dict[Source, EntityColumns] = {}
    for source, key in _ENTITY_KEYS.items():
        columns = source_columns(recipe.features, source)
        path = recipe.data.root / f"{source}.parquet"
        exists = path.exists()
        entities[source] = (
            load_entities(path, key, columns.ids, columns.dense) if exists else no_entities()
        )
    item_codes = None if codes is None else ItemCodes.load(codes)
    return JoinPlan(recipe, EventColumns.of(recipe), entities, item_codes, scratch)


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
            places = Places.of(events, plan)
            table = join_events(events, plan, places)
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


@dataclass(frozen=True)
class Places:
    """Where items and users of some events lie in the catalogue; -1 for those that do not."""

    rows: dict[Source, Int64Array]
    """One an event."""
    past_rows: dict[str, Int64Array]
    """One a past event, by history whose sequences read columns of items."""

    @classmethod
    def of(cls, events: pa.RecordBatch, plan: JoinPlan) -> "Places":
        """Looked up once."""
        items = plan.entities["items"]
        past = {
            name: events[history_column(name, "item_id")].flatten()
            for name in item_histories(plan.recipe.features)
        }
        return cls(
            {
                source: plan.entities[source].positions(ids_or_missing(events[key]))
                for source, key in _ENTITY_KEYS.items()
            },
            {name: items.positions(ids_or_missing(ids)) for name, ids in past.items()},
        )

    @property
    def num_unknown(self) -> dict[str, int]:
        """Of items, users, and past events."""
        past = sum(int((rows < 0).sum()) for rows in self.past_rows.values())
        found: dict[str, int] = {"histories": past}
        for source, rows in self.rows.items():
            found[source] = int((rows < 0).sum())
        return found


def _without_held_out(events: pa.RecordBatch, plan: JoinPlan) -> pa.RecordBatch:
    held_out = plan.recipe.evaluation.held_out_items
    return events if held_out is None else forget_held_out(events, plan.columns, held_out)


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


def join_events(events: pa.RecordBatch, plan: JoinPlan, places: Places) -> pa.Table:
    """Samples of some ingested events, in their order."""
    own = without_codes(plan.recipe.features)
    data = {samples.key_column(name): events[name] for name in samples.KEYS}
    for task in plan.recipe.ranking.tasks:
        data[samples.label_column(task.name)] = events[task.label_name].cast(pa.float32())
    for task_name, column in plan.columns.weights.items():
        weights = events[column].cast(pa.float32()).fill_null(1.0)
        data[samples.weight_column(task_name)] = weights
    for task_name, column in plan.columns.oracles.items():
        if column in events.schema.names:
            data[samples.oracle_column(task_name)] = events[column]
    for feature in own.sparse:
        data[samples.sparse_column(feature.name)] = _sparse(feature, events, places, plan)
    for dense in own.dense:
        if dense.source == "events":
            values = floats(events[dense.column_name])
        else:
            values = plan.entities[dense.source].dense[dense.column_name]
            values = values[places.rows[dense.source]]
        data[samples.dense_column(dense.name)] = pa.array(transform_dense(values, dense))
    for sequence in own.sequences:
        data[samples.sequence_column(sequence.name)] = _sequence(sequence, events, places, plan)
    if plan.codes is None:
        return pa.table(data)
    data |= code_columns(plan.recipe.features, plan.codes, events)
    return pa.table(data).replace_schema_metadata({samples.CODEBOOKS: plan.codes.codebooks})


def _sparse(
    feature: SparseFeature, events: pa.RecordBatch, places: Places, plan: JoinPlan
) -> pa.Array:
    name = feature.column_name
    if feature.source == "events" or name == _ENTITY_KEYS[feature.source]:
        column = id_column(events[name])
        at = np.arange(events.num_rows)
    else:
        column = plan.entities[feature.source].ids[name]
        at = places.rows[feature.source]
    if isinstance(column, IdLists):
        return column.take(at, feature.max_length)
    return pa.array(column[at])


def _sequence(
    feature: SequenceFeature, events: pa.RecordBatch, places: Places, plan: JoinPlan
) -> pa.ListArray:
    past_items = normal_lists(events[history_column(feature.history, "item_id")])
    name = feature.column_name
    match feature.source:
        case "events":
            return normal_lists(events[history_column(feature.history, name)])
        case "gap":
            times = normal_lists(events[history_column(feature.history, "timestamp")])
            lengths = np.diff(times.offsets.to_numpy())
            own = np.repeat(events["timestamp"].to_numpy(), lengths)
            values = gap_ids(own - times.values.to_numpy())
        case "items":
            values = past_items.values.to_numpy()
            if name != "item_id":
                column = plan.entities["items"].ids[name]
                assert not isinstance(column, IdLists)
                values = column[places.past_rows[feature.history]]
    return pa.ListArray.from_arrays(past_items.offsets, pa.array(values))


def gap_ids(gap_ms: Int64Array) -> Int64Array:
    """floor(log2(1 + seconds)) of gaps in milliseconds; exact at powers of two."""
    _, exponent = np.frexp(1 + gap_ms / 1000)  # x = mantissa * 2**exponent, mantissa in [0.5, 1)
    return exponent.astype(np.int64) - 1
