"""Samples of some ingested events: what join writes of a day, and a service makes of a request.

Pure: events and the columns of their users, items and codes in, the columns of `embedding.samples`
out. One function for both is why a served row equals the one that was trained on.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from embedding import samples
from embedding.feature_schema import SequenceFeature, Source, SparseFeature
from embedding.raw_ids import Int64Array, ids_or_missing
from multimodal.codes.schema import without_codes
from pipeline.codes.columns import code_columns
from pipeline.codes.features import ItemCodes
from pipeline.config import Recipe
from pipeline.samples.catalogue import check_catalogue
from pipeline.samples.columns import EventColumns, history_column, source_columns
from pipeline.samples.histories import normal_lists
from pipeline.samples.join_facts import item_histories
from pipeline.samples.lookup import (
    EntityColumns,
    IdLists,
    floats,
    id_column,
    load_entities,
    no_entities,
    transform_dense,
)

_ENTITY_KEYS: dict[Source, str] = {"items": "item_id", "users": "user_id"}


@dataclass(frozen=True)
class FeatureSources:
    """What samples hold beside the events themselves."""

    recipe: Recipe
    columns: EventColumns
    entities: dict[Source, EntityColumns]
    """`items` and `users`."""
    codes: ItemCodes | None
    """Where features follow from codes."""

    @classmethod
    def load(cls, recipe: Recipe, codes: Path | None = None) -> "FeatureSources":
        """The feature columns of items and users, and the codes of items.

        Args:
            recipe: names the data root and the features.
            codes: the file with the codes of items; needed where features follow from codes.

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
        return cls(recipe, EventColumns.of(recipe), entities, item_codes)


@dataclass(frozen=True)
class Places:
    """Where items and users of some events lie in the catalogue; -1 for those that do not."""

    rows: dict[Source, Int64Array]
    """One an event."""
    past_rows: dict[str, Int64Array]
    """One a past event, by history whose sequences read columns of items."""

    @classmethod
    def of(cls, events: pa.RecordBatch, sources: FeatureSources) -> "Places":
        """Looked up once."""
        items = sources.entities["items"]
        past = {
            name: events[history_column(name, "item_id")].flatten()
            for name in item_histories(sources.recipe.features)
        }
        return cls(
            {
                source: sources.entities[source].positions(ids_or_missing(events[key]))
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


def join_events(events: pa.RecordBatch, sources: FeatureSources, places: Places) -> pa.Table:
    """Samples of some ingested events, in their order."""
    own = without_codes(sources.recipe.features)
    data = {samples.key_column(name): events[name] for name in samples.KEYS}
    for task in sources.recipe.ranking.tasks:
        data[samples.label_column(task.name)] = events[task.label_name].cast(pa.float32())
    for task_name, column in sources.columns.weights.items():
        weights = events[column].cast(pa.float32()).fill_null(1.0)
        data[samples.weight_column(task_name)] = weights
    for task_name, column in sources.columns.oracles.items():
        if column in events.schema.names:
            data[samples.oracle_column(task_name)] = events[column]
    for feature in own.sparse:
        data[samples.sparse_column(feature.name)] = _sparse(feature, events, places, sources)
    for dense in own.dense:
        if dense.source == "events":
            values = floats(events[sources.columns.number_column(dense.column_name)])
        else:
            values = sources.entities[dense.source].dense[dense.column_name]
            values = values[places.rows[dense.source]]
        data[samples.dense_column(dense.name)] = pa.array(transform_dense(values, dense))
    for sequence in own.sequences:
        data[samples.sequence_column(sequence.name)] = _sequence(sequence, events, places, sources)
    if sources.codes is None:
        return pa.table(data)
    data |= code_columns(sources.recipe.features, sources.codes, events)
    return pa.table(data).replace_schema_metadata({samples.CODEBOOKS: sources.codes.codebooks})


def _sparse(
    feature: SparseFeature, events: pa.RecordBatch, places: Places, sources: FeatureSources
) -> pa.Array:
    name = feature.column_name
    if feature.source == "events" or name == _ENTITY_KEYS[feature.source]:
        column = id_column(events[name])
        at = np.arange(events.num_rows)
    else:
        column = sources.entities[feature.source].ids[name]
        at = places.rows[feature.source]
    if isinstance(column, IdLists):
        return column.take(at, feature.max_length)
    return pa.array(column[at])


def _sequence(
    feature: SequenceFeature, events: pa.RecordBatch, places: Places, sources: FeatureSources
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
                column = sources.entities["items"].ids[name]
                assert not isinstance(column, IdLists)
                values = column[places.past_rows[feature.history]]
    return pa.ListArray.from_arrays(past_items.offsets, pa.array(values))


def gap_ids(gap_ms: Int64Array) -> Int64Array:
    """floor(log2(1 + seconds)) of gaps in milliseconds; exact at powers of two."""
    _, exponent = np.frexp(1 + gap_ms / 1000)  # x = mantissa * 2**exponent, mantissa in [0.5, 1)
    return exponent.astype(np.int64) - 1
