"""The columns of samples that features derived from codes read, for some ingested events."""

import pyarrow as pa

from embedding import samples
from embedding.feature_schema import FeatureSchema
from embedding.raw_ids import ids_or_missing
from pipeline.codes.features import (
    ItemCodes,
    candidate_columns,
    cross_columns,
    history_columns,
    user_code_ids,
)
from pipeline.samples.columns import history_column
from pipeline.samples.histories import normal_lists
from pipeline.samples.lookup import floats, transform_dense

_USER_CODE = "user_code_"


def code_columns(
    features: FeatureSchema, codes: ItemCodes, events: pa.RecordBatch
) -> dict[str, pa.Array]:
    """Columns of all derived features, by their name in samples."""
    found = _candidate(features, codes, events)
    for history in {name.split(":")[0] for name in _columns(features) if ":" in name}:
        found |= _history(history, codes, events)
    data: dict[str, pa.Array] = {}
    for feature in features.sparse:
        if feature.source == "codes":
            data[samples.sparse_column(feature.name)] = found[feature.column_name]
    for dense in features.dense:
        if dense.source == "codes":
            values = transform_dense(floats(found[dense.column_name]), dense)
            data[samples.dense_column(dense.name)] = pa.array(values)
    for sequence in features.sequences:
        if sequence.source == "codes":
            column = f"{sequence.history}:{sequence.column_name}"
            data[samples.sequence_column(sequence.name)] = found[column]
    return data


def _columns(features: FeatureSchema) -> set[str]:
    """What the derived features read; `<history>:<name>` of a history."""
    columns = {f.column_name for f in features.sparse if f.source == "codes"}
    columns |= {f.column_name for f in features.dense if f.source == "codes"}
    sequences = (s for s in features.sequences if s.source == "codes")
    return columns | {f"{s.history}:{s.column_name}" for s in sequences}


def _candidate(
    features: FeatureSchema, codes: ItemCodes, events: pa.RecordBatch
) -> dict[str, pa.Array]:
    item_ids, user_ids = (ids_or_missing(events[key]) for key in ("item_id", "user_id"))
    found = candidate_columns(codes, item_ids)
    for name in _columns(features):
        if name.startswith(_USER_CODE):
            depth = int(name.removeprefix(_USER_CODE))
            found[name] = user_code_ids(codes, item_ids, user_ids, depth)
    return found


def _history(history: str, codes: ItemCodes, events: pa.RecordBatch) -> dict[str, pa.Array]:
    past = normal_lists(events[history_column(history, "item_id")])
    columns = history_columns(codes, past)
    columns |= cross_columns(codes, ids_or_missing(events["item_id"]), past)
    return {f"{history}:{name}": column for name, column in columns.items()}
