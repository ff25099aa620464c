"""What join counts, and which of it speaks against its samples."""

from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from pipeline.artifacts import StageFacts
from pipeline.config import Recipe
from pipeline.planning.id_use import IdFacts
from pipeline.samples.columns import source_columns


class JoinFacts(StageFacts):
    """What join wrote."""

    rows: int
    rows_per_day: dict[str, int]
    rows_held_out: int
    """Of items kept from training; part of `rows`."""
    unknown_users: int
    """Rows whose user has no row in users.parquet."""
    unknown_items: int
    """Rows whose item has no row in items.parquet (any more)."""
    item_history_events: int
    """Past events of histories whose sequences read columns of items."""
    unknown_history_items: int
    """Of those, how many are of items without a row in items.parquet."""
    mean_sequence_length: dict[str, float]
    """By history."""
    ids: dict[str, IdFacts]
    """By sparse and sequence feature."""


def unknown_rows(recipe: Recipe, facts: JoinFacts) -> list[str]:
    """Sentences on rows that lack columns of their user, item or past items."""
    of_users = source_columns(recipe.features, "users")
    found = {
        f"{facts.unknown_users} of {facts.rows} rows lack the columns of their user": (
            facts.unknown_users if of_users.ids or of_users.dense else 0
        ),
        f"{facts.unknown_items} of {facts.rows} rows lack the columns of their item": (
            facts.unknown_items if _reads_items(recipe) else 0
        ),
        f"{facts.unknown_history_items} of {facts.item_history_events} past events lack the "
        "columns of their item": facts.unknown_history_items,
    }
    return [sentence for sentence, count in found.items() if count]


def require_items(recipe: Recipe, facts: JoinFacts) -> None:
    """Refuse samples whose items have left the catalogue.

    Raises:
        UserError: more rows or past events than the recipe allows lack the columns of their item.
    """
    limit = recipe.data.max_quarantined_share
    counts = {"past events": (facts.unknown_history_items, facts.item_history_events)}
    if _reads_items(recipe):
        counts = {"rows": (facts.unknown_items, facts.rows), **counts}
    for what, (unknown, total) in counts.items():
        if unknown > limit * total:
            raise UserError(
                f"{unknown} of {total} {what} are of items without a row in "
                f"{recipe.data.root / 'items.parquet'}, more than data.max_quarantined_share="
                f"{limit} allows: their item features would be missing. Keep items that are no "
                "longer offered in the file as long as events or histories show them, or raise "
                "the limit"
            )


def item_histories(features: FeatureSchema) -> list[str]:
    """Histories whose sequences read columns of items."""
    read = {
        s.history for s in features.sequences if s.source == "items" and s.column_name != "item_id"
    }
    return [history.name for history in features.histories if history.name in read]


def _reads_items(recipe: Recipe) -> bool:
    columns = source_columns(recipe.features, "items")
    return bool(columns.ids or columns.dense) or recipe.content is not None
