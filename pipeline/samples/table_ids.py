"""What every table of a recipe does with the ids of a join artifact."""

from collections.abc import Mapping
from pathlib import Path

import torch

from embedding.config import Hashed, Identity, StrictConfig, TableConfig
from embedding.feature_schema import FeatureSchema
from embedding.hashing import collision_rate, expected_collision_rate, out_of_range
from pipeline.planning.id_use import FILE, IdFacts, IdUse, merge_uses, read_uses


class TableIds(StrictConfig):
    """Ids that all features of one table look up."""

    table: str
    scheme: str
    lookups: int
    """Missing ids left out."""
    missing_share: float
    """Of all lookups."""
    distinct: int
    sampled: bool
    """Whether `distinct`, `collision_rate` and `out_of_range` are estimates."""
    collision_rate: float | None
    """Share of the distinct ids that share their row with another one; hashed tables only."""
    out_of_range: int | None
    """Lookups of ids that have no row; identity tables only."""


def table_ids(
    schema: FeatureSchema, join_dir: Path, facts: Mapping[str, IdFacts]
) -> list[TableIds]:
    """One entry a table, in the order of the schema.

    Tables are not join's business: its artifact holds the ids by feature, and resizing a table asks
    for no new one.
    """
    uses = read_uses(join_dir / FILE, facts)
    return [
        _table_ids(
            table, merge_uses(uses[f.name] for f in schema.id_features if f.table == table.name)
        )
        for table in schema.tables
    ]


def _table_ids(table: TableConfig, use: IdUse) -> TableIds:
    ids_N = torch.from_numpy(use.ids)
    sampled = use.level > 0
    rate = outside = None
    match table.ids:
        case Hashed():
            # A sample would miss most collisions.
            rate = (
                expected_collision_rate(use.distinct, table)
                if sampled
                else collision_rate(ids_N, table)
            )
        case Identity():
            inside_sample = int(use.id_lookups[out_of_range(ids_N, table).numpy()].sum())
            share = inside_sample / max(int(use.id_lookups.sum()), 1)
            outside = round(share * use.lookups) if sampled else inside_sample
        case _:
            pass
    return TableIds(
        table=table.name,
        scheme=table.ids.kind,
        lookups=use.lookups,
        missing_share=use.missing / max(use.lookups + use.missing, 1),
        distinct=use.distinct,
        sampled=sampled,
        collision_rate=rate,
        out_of_range=outside,
    )
