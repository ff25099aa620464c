"""How many distinct items a training step meets, and how many of them it encodes.

Items are taken to be drawn independently, on every rank and for every event, as often as traffic
or Zipf's law says. Imports nothing heavy.
"""

# Shapes: X bins of equally popular items.

from dataclasses import dataclass

import numpy as np
from pydantic import NonNegativeFloat, PositiveInt

from embedding.config import StrictConfig
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.item_columns import item_sequences
from embedding.planning.id_distribution import DEFAULT_EXPONENT, zipf
from embedding.planning.traffic import Traffic
from multimodal.content_config import ContentConfig, Gradient

_ITEM_ID = "item_id"


class ItemLoad(StrictConfig):
    """The items behind the rows of a recipe with content."""

    num_items: PositiveInt
    """Of the catalogue: the bank holds a vector of each."""
    counted: str
    """Where that number comes from."""
    bin_items: tuple[float, ...]
    """Items of every popularity bin, hottest first."""
    bin_shares: tuple[float, ...]
    """Share of all occurrences that goes to every bin."""
    events_per_row: NonNegativeFloat
    """Items of all histories that content is read of."""


@dataclass(frozen=True)
class StepItems:
    """Expected distinct items of one step."""

    candidates: float
    """Of one rank's batch."""
    read: float
    """Of one rank's batch, its histories included."""
    encoded: float
    """Of all ranks together, with gradient."""


def item_load(
    content: ContentConfig,
    schema: FeatureSchema,
    traffic: Traffic | None,
    num_items: int | None = None,
) -> ItemLoad:
    """The items of a recipe.

    Args:
        content: the recipe's.
        schema: its features.
        traffic: measured lookups of the table of item ids, and lengths of histories; else Zipf's
            law, and every history at its greatest length.
        num_items: of items.parquet; None: as many as the table of item ids has rows.

    Raises:
        UserError: neither items.parquet nor a table says how many items there are.
    """
    table = _item_table(schema)
    counted = "items.parquet"
    if num_items is None:
        if table is None:
            raise UserError(
                "content: the number of items is not known, as items.parquet is not in data.root "
                "and no feature looks up item_id; set data.root to a directory that holds it"
            )
        num_items, counted = schema.table(table).num_embeddings, f"rows of table {table!r}"
    measured = None if traffic is None or table is None else traffic.table(table)
    if measured is not None and measured.bin_rows:
        items, shares = measured.bin_rows, measured.bin_shares
    else:
        ids = zipf(num_items, DEFAULT_EXPONENT)
        items, shares = ids.num_rows, ids.mass
    return ItemLoad(
        num_items=num_items,
        counted=counted,
        bin_items=items,
        bin_shares=shares,
        events_per_row=_events_per_row(content, schema, traffic),
    )


def _item_table(schema: FeatureSchema) -> str | None:
    shown = [f.table for f in schema.sparse if f.column_name == _ITEM_ID and f.source != "users"]
    remembered = [
        s.table for s in schema.sequences if s.column_name == _ITEM_ID and s.source == "items"
    ]
    return next(iter(shown + remembered), None)


def _events_per_row(
    content: ContentConfig, schema: FeatureSchema, traffic: Traffic | None
) -> float:
    if not content.in_history:
        return 0.0
    measured = {} if traffic is None else traffic.ids_per_sample
    greatest = {history.name: float(history.max_length) for history in schema.histories}
    return sum(
        measured.get(sequence, greatest[history])
        for history, sequence in item_sequences(schema).items()
    )


def step_items(
    load: ItemLoad, policy: Gradient, batch_size_per_rank: int, world_size: int, growth: float = 1.0
) -> StepItems:
    """What `multimodal.gradient_items` and the ranks' exchange of it come to, on the average.

    Args:
        load: the recipe's items.
        policy: which are encoded with gradient.
        batch_size_per_rank: rows of a rank's batch.
        world_size: ranks; an item that several want is encoded once.
        growth: factor of the number of items, as popular relative to one another.
    """
    items_X = growth * np.asarray(load.bin_items)
    missed_X = np.log1p(-np.minimum(np.asarray(load.bin_shares) / items_X, 1 - 1e-15))
    shown_X = -np.expm1(batch_size_per_rank * missed_X)
    met_X = -np.expm1(batch_size_per_rank * (1 + load.events_per_row) * missed_X)
    candidates, read = float(items_X @ shown_X), float(items_X @ met_X)
    others = read - candidates
    own, sampled = _own_items(policy, candidates, others)
    # Each rank picks its own at random, so ranks that met the same item often pick it twice.
    wanted_X = shown_X * (own / candidates)
    if others > 0:
        wanted_X = wanted_X + (met_X - shown_X) * (sampled / others)
    lacking_X = np.log1p(-np.minimum(wanted_X, 1 - 1e-15))
    encoded = float(items_X @ -np.expm1(world_size * lacking_X))
    return StepItems(candidates=candidates, read=read, encoded=encoded)


def _own_items(policy: Gradient, candidates: float, others: float) -> tuple[float, float]:
    """Candidates and other items that one rank wants encoded."""
    share = {"targets": 0.0, "targets+sample": policy.sample_share, "all": 1.0}[policy.items]
    own, sampled = candidates, share * others
    bound = policy.max_items_per_step
    if bound is not None:
        kept_free = min(sampled, round(policy.history_share * bound), bound - 1)
        own = min(own, bound - kept_free)
        sampled = min(sampled, bound - own)
    return own, sampled
