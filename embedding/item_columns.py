"""Which features of a schema hold item ids. Imports nothing heavy, for checks without torch."""

from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema, SparseFeature

_ITEM_ID = "item_id"
_OF_EVENTS = ("events", "items")


def item_sequences(schema: FeatureSchema) -> dict[str, str]:
    """The sequence of past item ids of every history.

    Raises:
        UserError: a history has none, so that its items are not known.
    """
    found = {
        sequence.history: sequence.name
        for sequence in reversed(schema.sequences)
        if sequence.source == "items" and sequence.column_name == _ITEM_ID
    }
    lacking = [history.name for history in schema.histories if history.name not in found]
    if lacking:
        raise UserError(
            f"content.in_history: no sequence of history {lacking[0]!r} reads item_id, so its "
            "items are not in the samples; add {name: past_item, history: "
            f"{lacking[0]}, table: ..., source: items, column: item_id}} to features.sequences, or "
            "set content.in_history to false"
        )
    return found


def candidate_feature(schema: FeatureSchema) -> SparseFeature | None:
    """The sparse feature that looks up the candidate's id; None where there is none."""
    wanted = (f for f in schema.sparse if f.column_name == _ITEM_ID and f.source in _OF_EVENTS)
    return next(wanted, None)


def candidate_field(schema: FeatureSchema) -> str:
    """The name of that feature.

    Raises:
        UserError: there is none.
    """
    found = candidate_feature(schema)
    if found is None:
        raise UserError(
            "content.cic compares an item's content with the embedding of its id, and no sparse "
            "feature reads item_id; add one to features.sparse, or set content.cic to null"
        )
    return found.name
