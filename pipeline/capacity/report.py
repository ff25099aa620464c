"""The answer of a capacity study as a rich table and as one self-contained HTML page."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from pipeline.capacity.answer import FAR_DAYS, has_room, today
from pipeline.capacity.types import CapacityAnswer, CapacityPoint
from pipeline.config import Recipe
from pipeline.console import duration, human, size
from pipeline.reports import charts
from pipeline.reports.page import write_page

GIB = 1 << 30
_TERMINAL_ROWS = 24


def points_table(answer: CapacityAnswer) -> Table:
    """The best batch size of every cluster and growth, the chosen point marked."""
    points = best_batches(answer.points, answer.chosen)
    title = f"{len(answer.points)} points in {duration(answer.seconds)}; the best batch of each"
    view = Table(box=SIMPLE, title=title, title_justify="left")
    view.add_column("cluster", no_wrap=True)
    for column in ("rows x", "dims x", "batch", "rows/s", "ms", "free", "lasts", "cost"):
        view.add_column(column, justify="right")
    shown = points[:_TERMINAL_ROWS]
    if answer.chosen is not None and answer.chosen not in shown:
        shown[-1] = answer.chosen
    for point in shown:
        view.add_row(*_cells(point), style="bold green" if point == answer.chosen else None)
    if len(points) > len(shown):
        view.caption = f"{len(points) - len(shown)} more in the JSON and the report"
    return view


def best_batches(
    points: Sequence[CapacityPoint], chosen: CapacityPoint | None
) -> list[CapacityPoint]:
    """For every cluster, growth and dims the point with the most rows per second.

    Before it come the chosen one and, where there is one, any with room in memory.
    """
    best: dict[tuple[str, float, float], CapacityPoint] = {}

    def merit(point: CapacityPoint) -> tuple[bool, bool, float]:
        return point == chosen, has_room(point), point.rows_per_s or 0.0

    for point in points:
        key = (point.topology, point.growth, point.dim_factor)
        if key not in best or merit(point) > merit(best[key]):
            best[key] = point
    return list(best.values())


def _cells(point: CapacityPoint) -> tuple[str, ...]:
    lead = (
        point.topology,
        f"{point.growth:g}",
        f"{point.dim_factor:g}",
        f"{point.batch_size_per_rank:,}",
    )
    if point.refusal is not None:
        return (*lead, "does not fit", "", "", "", "")
    cost = point.cost_per_billion_rows
    return (
        *lead,
        human(point.rows_per_s or 0),
        f"{1e3 * (point.step_s or 0):.3g}",
        f"{point.headroom or 0:.0%}",
        _lasts(point),
        "-" if cost is None else f"{cost:.2f}",
    )


def _lasts(point: CapacityPoint) -> str:
    if point.days_left is not None:
        return f"{point.days_left:,.0f} d" if point.days_left <= FAR_DAYS else "> 10 years"
    if point.breaks_at_growth is None:
        return "> x1000"
    return f"x{point.breaks_at_growth:.2f}"


def plan_line(
    chosen: CapacityPoint, recipe: str, given: Recipe, overrides: Sequence[str] = ()
) -> str:
    """The `braid plan` that makes the plan of a point.

    Args:
        chosen: the point, of tables as they are.
        recipe: as it was named.
        given: as the sweep had it, with the traffic that its tables were planned with.
        overrides: `path.to.key=value` each.
    """
    sharding = given.embedding.sharding
    words = ["braid", "plan", "-r", recipe, "-t", chosen.topology]
    words += ["--batch-size-per-rank", str(chosen.batch_size_per_rank)]
    if sharding.traffic is not None:
        words += ["--traffic", str(sharding.traffic)]
    if chosen.calibration is not None:
        words += ["--calibration", str(chosen.calibration)]
    for override in overrides:
        words += ["--set", override]
    if chosen.calibration is None and sharding.calibration is not None:  # of another machine
        words += ["--set", "embedding.sharding.calibration=null"]
    return shlex.join(words)


def write_capacity_report(answer: CapacityAnswer, path: Path, command: str | None = None) -> None:
    """The page, written in one move; `command` shows the chosen point's plan."""
    write_page(
        path,
        "capacity.html.j2",
        recipe=answer.recipe,
        answer=answer.answer,
        tiles=_tiles(answer),
        charts=_charts(answer),
        chosen=answer.chosen,
        command=command,
        shardings=(answer.chosen.shardings or {}) if answer.chosen else {},
        rows=[
            {"cells": _cells(p), "chosen": p == answer.chosen, "refusal": p.refusal}
            for p in best_batches(answer.points, answer.chosen)
        ],
        dense=answer.dense,
        content=answer.content,
        num_points=len(answer.points),
        seconds=duration(answer.seconds),
    )


def _tiles(answer: CapacityAnswer) -> list[dict[str, str]]:
    chosen = answer.chosen
    if chosen is None:
        return []
    tiles = [
        {"label": "Cluster", "value": chosen.topology, "note": f"{chosen.world_size} ranks"},
        {"label": "Rows per second", "value": human(chosen.rows_per_s or 0), "note": "all ranks"},
        {
            "label": "Step",
            "value": f"{1e3 * (chosen.step_s or 0):.3g} ms",
            "note": f"{chosen.batch_size_per_rank:,} rows a rank, "
            f"{chosen.batch_size_per_rank * chosen.world_size:,} in all",
        },
        {
            "label": "Memory free",
            "value": f"{chosen.headroom or 0:.0%}",
            "note": f"of {size(chosen.device_bytes or 0)} of the fullest rank"
            + ("" if chosen.host_headroom is None else ", or of its host"),
        },
        {"label": "Lasts", "value": _lasts(chosen), "note": "until tables no longer fit"},
    ]
    if chosen.content_s is not None:
        tiles.insert(
            3,
            {
                "label": "Of it content",
                "value": f"{1e3 * chosen.content_s:.3g} ms",
                "note": f"{chosen.content_items or 0:,.0f} items a step, "
                f"{size(chosen.content_bytes or 0)} a rank",
            },
        )
    if chosen.cost_per_billion_rows is not None:
        cost = f"{chosen.cost_per_billion_rows:.2f}"
        tiles.append({"label": "A billion rows", "value": cost, "note": "at the given prices"})
    return tiles


def _charts(answer: CapacityAnswer) -> list[dict[str, str]]:
    fitting = today(answer.points)
    points = [p for p in best_batches(answer.points, answer.chosen) if p in fitting]
    if not points:
        return []
    machines = sorted({p.machine for p in points})
    throughput: dict[str, charts.Curve] = {}
    memory: dict[str, charts.Curve] = {}
    for machine in machines:
        mine = sorted((p for p in points if p.machine == machine), key=lambda p: p.world_size)
        ranks = [float(p.world_size) for p in mine]
        throughput[machine] = (ranks, [p.rows_per_s or 0.0 for p in mine])
        memory[machine] = (ranks, [(p.peak_bytes or 0) / (p.device_bytes or 1) for p in mine])
    return [
        {
            "title": "Throughput over ranks",
            "note": "the best batch size of every cluster",
            "svg": charts.lines(
                throughput,
                x_label="ranks",
                y_label="rows per second",
                reference=answer.target.needed_rows_per_s,
            ),
        },
        {
            "title": "Memory of the fullest rank",
            "note": "share of the device's memory, the reserve for the dense side included",
            "svg": charts.lines(memory, x_label="ranks", y_label="share in use", reference=1.0),
        },
        _pareto(answer, points),
    ]


def _pareto(answer: CapacityAnswer, points: list[CapacityPoint]) -> dict[str, str]:
    """Cost against time: clusters that nothing beats in both are joined."""
    priced = all(p.price_per_hour is not None for p in points)

    def cost(point: CapacityPoint) -> float:
        return point.cost_per_billion_rows or 0.0 if priced else float(point.world_size)

    def hours(point: CapacityPoint) -> float:
        return 1e9 / (point.rows_per_s or 1.0) / 3600

    groups: dict[str, Any] = {
        machine: [(cost(p), hours(p), p.topology) for p in points if p.machine == machine]
        for machine in sorted({p.machine for p in points})
    }
    front = [
        (cost(p), hours(p))
        for p in points
        if not any(
            cost(q) <= cost(p)
            and hours(q) <= hours(p)
            and (cost(q), hours(q)) != (cost(p), hours(p))
            for q in points
        )
    ]
    chosen = answer.chosen
    return {
        "title": "Cost against time",
        "note": "the line joins clusters that none beats in both",
        "svg": charts.scatter(
            groups,
            front=sorted(front),
            marked=None if chosen is None else (cost(chosen), hours(chosen)),
            x_label="cost of a billion rows" if priced else "ranks",
            y_label="hours for a billion rows",
        ),
    }
