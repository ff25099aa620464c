"""What a table's real lookups say about its rows, its dim and its cache."""

import math
from dataclasses import dataclass

from embedding.config import Hashed, Identity, ManagedCollision, TableConfig
from embedding.limits import COLUMN_MULTIPLE
from embedding.planning.id_distribution import IdDistribution
from embedding.planning.traffic import TableTraffic, Traffic

CACHE_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Points of the hit curve, as shares of the table's rows."""
_UNUSED_SHARE = 0.5
_FULL_SHARE = 0.9
_ONCE_SHARE = 0.5
_HEADROOM = 1.5
_ROWS_PER_HASHED_ID = 4
"""So many that about a fifth of the ids share a row."""
_SKEWED_HIT = 0.9


@dataclass(frozen=True)
class TableFacts:
    """Figures of one table's lookups."""

    table: TableConfig
    touched_share: float
    """Rows looked up at least once, of all rows."""
    once_share: float
    """Rows looked up exactly once, of the touched ones."""
    top_share: float
    """Lookups that go to the hottest 1% of the touched rows."""
    hit_rates: dict[float, float]
    """By cached share of all rows: the best hit rate any cache of that size reaches."""
    advice: tuple[str, ...]
    """Sentences; empty where nothing needs to change."""


def table_facts(tables: tuple[TableConfig, ...], traffic: Traffic) -> list[TableFacts]:
    """Facts and advice for every measured table, in the schema's order."""
    facts = []
    for table in tables:
        measured = traffic.table(table.name)
        if measured is not None and measured.lookups:
            facts.append(_facts(table, measured))
    return facts


def _facts(table: TableConfig, measured: TableTraffic) -> TableFacts:
    ids = IdDistribution(measured.bin_rows, measured.bin_shares)
    hits = {share: ids.share_of_hottest(share * table.num_embeddings) for share in CACHE_SHARES}
    touched = measured.rows_touched / table.num_embeddings
    advice = [
        sentence
        for sentence in (
            _rows_advice(table, measured, touched),
            _dim_advice(table, measured),
            _cache_advice(hits, touched),
        )
        if sentence
    ]
    return TableFacts(
        table=table,
        touched_share=touched,
        once_share=measured.rows_seen_once / measured.rows_touched,
        top_share=ids.share_of_hottest(0.01 * measured.rows_touched),
        hit_rates=hits,
        advice=tuple(advice),
    )


def _rows_advice(table: TableConfig, measured: TableTraffic, touched: float) -> str | None:
    """Fewer rows, as far as the kind of ids allows; or more, where hashed ids crowd them."""
    match table.ids:
        case Hashed():
            return _hashed_rows(table, touched)
        case Identity():
            # A row is an id: those above the highest one are all that can go.
            used = None if measured.highest_row is None else measured.highest_row + 1
            what = "every id that was looked up"
        case ManagedCollision():
            used, what = measured.rows_touched, "as many ids"
    if touched >= _UNUSED_SHARE or used is None:
        return None
    rows = _round_up(_HEADROOM * used)
    if rows >= table.num_embeddings:
        return None
    return (
        f"{1 - touched:.0%} of its rows were never looked up: num_embeddings={rows} holds {what}, "
        f"leaves {_HEADROOM - 1:.0%} room and saves {1 - rows / table.num_embeddings:.0%} of its "
        "memory"
    )


def _hashed_rows(table: TableConfig, touched: float) -> str | None:
    if table.num_embeddings <= 2:  # noqa: PLR2004 # one row beside the OOV row
        return None
    # Of n ids hashed into R rows, R (1 - exp(-n / R)) rows are touched.
    share = min(touched, 1 - 1 / table.num_embeddings)
    distinct = -table.num_embeddings * math.log1p(-share)
    rows = _round_up(_ROWS_PER_HASHED_ID * distinct)
    before, after = (_sharing(distinct, n) for n in (table.num_embeddings, rows))
    if touched < _UNUSED_SHARE and rows < table.num_embeddings:
        return (
            f"{1 - touched:.0%} of its rows were never looked up: num_embeddings={rows} saves "
            f"{1 - rows / table.num_embeddings:.0%} of its memory, and {after:.0%} of its ids "
            f"instead of {before:.0%} would share a row with another"
        )
    if touched > _FULL_SHARE:
        return (
            f"{touched:.0%} of its rows are in use, so about {before:.0%} of its ids share a row "
            f"with another: num_embeddings={rows} would bring that to {after:.0%}, or use "
            "managed_collision"
        )
    return None


def _sharing(num_ids: float, num_rows: int) -> float:
    """Share of hashed ids that share their row with another one."""
    return 1 - math.exp(-num_ids / num_rows)


def _dim_advice(table: TableConfig, measured: TableTraffic) -> str | None:
    """Two signs of too many columns: more than the rows can span, or rows hardly ever trained."""
    dim, rows = table.embedding_dim, measured.rows_touched
    if dim > rows and dim > COLUMN_MULTIPLE:
        fitting = max(COLUMN_MULTIPLE, rows // COLUMN_MULTIPLE * COLUMN_MULTIPLE)
        return (
            f"{rows} rows in use span at most {rows} of its {dim} dims: embedding_dim={fitting} "
            "holds the same"
        )
    once = measured.rows_seen_once / rows
    per_row = measured.lookups / rows
    if once > _ONCE_SHARE and per_row < dim and dim >= 2 * COLUMN_MULTIPLE:
        half = max(COLUMN_MULTIPLE, dim // 2 // COLUMN_MULTIPLE * COLUMN_MULTIPLE)
        return (
            f"{once:.0%} of its rows in use were seen once and the mean row {per_row:.1f} times, "
            f"fewer than its {dim} dims: try embedding_dim={half}"
        )
    return None


def _cache_advice(hits: dict[float, float], touched: float) -> str | None:
    for share, hit in hits.items():
        if hit >= _SKEWED_HIT and share <= 0.2 and touched > share:  # noqa: PLR2004 # small caches
            return (
                f"a cache of {share:.0%} of its rows answers up to {hit:.0%} of the lookups: "
                "fused_uvm_caching suits it when device memory is short"
            )
    return None


def _round_up(rows: float) -> int:
    """To two figures."""
    digits = 10 ** max(int(math.log10(max(rows, 1))) - 1, 0)
    return max(2, math.ceil(rows / digits) * digits)
