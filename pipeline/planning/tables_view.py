"""A plan as a person reads it: rich tables of tables, ranks and differences."""

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.console import RenderableType
from rich.table import Table

from embedding.planning.plan_description import (
    BYTE_KINDS,
    HOST_BYTE_KINDS,
    PHASES,
    PlanDescription,
    Prediction,
    TablePlan,
)
from pipeline.console import human, size

_MAX_RANKS = 8
"""Ranks shown one by one; of more, the fullest and the busiest ones."""
_MAX_NAMES = 8


def plan_view(plan: PlanDescription) -> Iterator[RenderableType]:
    """Answer first, then where tables are, then what every rank holds and does."""
    predicted = plan.predicted
    assert predicted is not None
    yield (
        f"[bold]{plan.topology}[/]: one step of the sparse side takes about "
        f"[bold]{milliseconds(predicted.step_s)}[/] with {plan.batch_size_per_rank:,} rows a rank; "
        f"the fullest rank holds [bold]{size(predicted.peak_bytes)}[/] of tables and buffers.\n"
        f"Limit: {predicted.binding}.\n"
        f"Constants: {predicted.constants}. Found by: {plan.proposer}. "
        f"Busiest rank over mean: {predicted.imbalance:.2f}.\n"
        f"{_lookups(plan)}"
    )
    yield _tables(plan)
    yield from _ranks(plan)


def _lookups(plan: PlanDescription) -> str:
    """What the tables' lookups are taken to be."""
    assumed = plan.unmeasured or ()
    if not assumed:
        return "Lookups: as measured."
    if len(assumed) == len(plan.tables):
        return "Lookups: by Zipf's law; `braid traffic` measures them."
    more = len(assumed) - _MAX_NAMES
    named = ", ".join(assumed[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
    return f"Lookups: as measured, but by Zipf's law of {named}: the traffic has none of them."


def _tables(plan: PlanDescription) -> Table:
    view = Table(box=SIMPLE, title="tables", title_justify="left")
    view.add_column("table")
    view.add_column("sharding")
    view.add_column("kernel")
    for column in ("rows", "dim", "weights, all ranks"):
        view.add_column(column, justify="right")
    view.add_column("ranks")
    for table in plan.tables:
        weights = sum(shard.weight_bytes for shard in table.shards)
        rows = max(shard.row_offset + shard.num_rows for shard in table.shards)
        dim = max(shard.column_offset + shard.num_columns for shard in table.shards)
        view.add_row(
            table.table,
            sharding_of(table),
            kernel_of(table),
            human(rows),
            str(dim),
            size(weights),
            ranks_of(table),
        )
    return view


def _ranks(plan: PlanDescription) -> Iterator[Table]:
    predicted = plan.predicted
    assert predicted is not None
    shown = list(range(plan.world_size))
    if len(shown) > _MAX_RANKS:
        busiest = sorted(shown, key=lambda r: -sum(predicted.ranks[r].seconds.values()))
        fullest = sorted(shown, key=lambda r: -sum(predicted.ranks[r].bytes.values()))
        shown = sorted({*busiest[: _MAX_RANKS // 2], *fullest[: _MAX_RANKS // 2]})
    title = "ranks" if len(shown) == plan.world_size else "the busiest and the fullest ranks"
    yield _memory(predicted, shown, title)
    yield _times(predicted, shown, title)


def _memory(predicted: Prediction, shown: list[int], title: str) -> Table:
    kinds = [k for k in BYTE_KINDS if any(r.bytes[k] for r in predicted.ranks)]
    on_host = [k for k in HOST_BYTE_KINDS if any(r.host_bytes[k] for r in predicted.ranks)]
    largest = max(max(*rank.host_bytes.values(), *rank.bytes.values()) for rank in predicted.ranks)
    unit, divisor = ("GiB", 1 << 30) if largest >= 1 << 30 else ("MiB", 1 << 20)
    view = Table(box=SIMPLE, title=f"{title}: memory in {unit}", title_justify="left")
    for column in ("rank", *kinds, "all", *(f"+ host {kind}" for kind in on_host)):
        view.add_column(column, justify="right")
    for rank in shown:
        part = predicted.ranks[rank]
        held = [*(part.bytes[kind] for kind in kinds), sum(part.bytes.values())]
        held += [part.host_bytes[kind] for kind in on_host]
        view.add_row(str(rank), *(f"{n / divisor:,.2f}" for n in held))
    return view


def _times(predicted: Prediction, shown: list[int], title: str) -> Table:
    phases = [p for p in PHASES if predicted.phase_s[p]]
    view = Table(box=SIMPLE, title=f"{title}: milliseconds of a step", title_justify="left")
    for column in ("rank", *(p.replace("_", " ") for p in phases)):
        view.add_column(column, justify="right")
    for rank in shown:
        spent = [f"{1e3 * predicted.ranks[rank].seconds[phase]:.3g}" for phase in phases]
        view.add_row(str(rank), *spent)
    view.add_row("slowest", *(f"{1e3 * predicted.phase_s[phase]:.3g}" for phase in phases))
    return view


def diff_table(before: PlanDescription, after: PlanDescription) -> RenderableType:
    """What changed from one plan to another."""
    names = [table.table for table in after.tables]
    names += [table.table for table in before.tables if after.table(table.table) is None]
    changed = [n for n in names if placement(before.table(n)) != placement(after.table(n))]
    head = _difference(before, after)
    if not changed:
        return f"{head}No table is placed differently."
    number = "1 table differs" if len(changed) == 1 else f"{len(changed)} tables differ"
    view = Table(box=SIMPLE, title=f"{head}{number}", title_justify="left")
    for column in ("table", "before", "after"):
        view.add_column(column)
    for name in changed:
        view.add_row(name, placement(before.table(name)), placement(after.table(name)))
    return view


def _difference(before: PlanDescription, after: PlanDescription) -> str:
    if before.predicted is None or after.predicted is None:
        return ""
    was, now = before.predicted, after.predicted
    return (
        f"step {milliseconds(was.step_s)} -> {milliseconds(now.step_s)}, fullest rank "
        f"{size(was.peak_bytes)} -> {size(now.peak_bytes)}. "
    )


def placement(table: TablePlan | None) -> str:
    """One table's sharding, kernel and ranks in a few words."""
    if table is None:
        return "absent"
    return f"{sharding_of(table)} {kernel_of(table)} on {ranks_of(table)}"


def sharding_of(table: TablePlan) -> str:
    """Sharding type, with the number of column shards."""
    columns = len({shard.column_offset for shard in table.shards})
    return f"{table.sharding} x{columns}" if columns > 1 else table.sharding


def kernel_of(table: TablePlan) -> str:
    """Kernel, with the cached share."""
    cached = table.cache_load_factor
    return table.kernel if cached is None else f"{table.kernel} {cached:.0%}"


def ranks_of(table: TablePlan) -> str:
    """Ranks as ranges: 0-7, 12."""
    ranks = sorted({shard.rank for shard in table.shards})
    ranges: list[list[int]] = []
    for rank in ranks:
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in ranges)


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with three figures."""
    return f"{seconds * 1e3:.3g} ms"
