"""Table traffic as a person reads it."""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE
from rich.table import Table

from embedding.planning.table_advice import CACHE_SHARES, TableFacts
from embedding.planning.traffic import MIN_GROWTH_DAYS, Traffic
from pipeline.console import human


def facts_table(facts: Sequence[TableFacts]) -> Table:
    """One line a table: use, skew and the hit curve."""
    view = Table(box=SIMPLE, title="lookups of the tables", title_justify="left")
    view.add_column("table")
    for column in ("rows", "dim", "in use", "seen once", "hottest 1%"):
        view.add_column(column, justify="right")
    for share in CACHE_SHARES:
        view.add_column(f"hit {share:.0%}", justify="right")
    for fact in facts:
        view.add_row(
            fact.table.name,
            human(fact.table.num_embeddings),
            str(fact.table.embedding_dim),
            f"{fact.touched_share:.0%}",
            f"{fact.once_share:.0%}",
            f"{fact.top_share:.0%}",
            *(f"{fact.hit_rates[share]:.0%}" for share in CACHE_SHARES),
        )
    return view


def growth_line(traffic: Traffic) -> str | None:
    """Why the rows that a day adds are not told; None: they are."""
    if traffic.days >= MIN_GROWTH_DAYS:
        return None
    counted = "1 day" if traffic.days == 1 else f"{traffic.days} days"
    return (
        f"How fast tables grow is not told: the samples are of {counted}, and below "
        f"{MIN_GROWTH_DAYS} rows that come back look new."
    )


def advice_lines(facts: Sequence[TableFacts]) -> Iterator[str]:
    """A sentence for everything that should change."""
    for fact in facts:
        for sentence in fact.advice:
            yield f"[bold]{fact.table.name}[/]: {sentence}."
