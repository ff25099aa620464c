"""From the points of a sweep to the answer: which cluster, how fast, how long it lasts."""

from collections.abc import Iterator, Sequence

from multimodal.content_config import ContentConfig, Service
from pipeline.capacity_types import CapacityPoint, Target
from pipeline.console import duration, human
from pipeline.plan_tables_view import size

FAR_DAYS = 3650
"""Further ahead no number of days is said."""
MIN_HEADROOM = 0.05
"""A cluster whose fullest rank has less free memory is no recommendation."""


def today(points: Sequence[CapacityPoint]) -> list[CapacityPoint]:
    """Points of the tables as they are now, that fit."""
    return [p for p in points if p.growth == 1 and p.dim_factor == 1 and p.refusal is None]


def choose(points: Sequence[CapacityPoint], target: Target) -> CapacityPoint | None:
    """The cheapest cluster that meets the target: by price an hour, else by ranks.

    Without a target, the one with the cheapest rows; without prices, the most rows per rank.
    """
    roomy = [p for p in today(points) if (p.headroom or 0.0) >= MIN_HEADROOM] or today(points)
    needed = target.needed_rows_per_s
    if needed is None:
        return min(roomy, key=_cost_of_rows, default=None)
    enough = [p for p in roomy if (p.rows_per_s or 0.0) >= needed]
    return min(enough, key=lambda p: (*_cost_of_cluster(p), -(p.rows_per_s or 0.0)), default=None)


def _cost_of_rows(point: CapacityPoint) -> tuple[float, float]:
    if point.cost_per_billion_rows is not None:
        return 0.0, point.cost_per_billion_rows
    return 1.0, -(point.rows_per_s or 0.0) / point.world_size


def _cost_of_cluster(point: CapacityPoint) -> tuple[float, float]:
    if point.price_per_hour is not None:
        return 0.0, point.price_per_hour
    return 1.0, float(point.world_size)


def answer_of(
    points: Sequence[CapacityPoint],
    chosen: CapacityPoint | None,
    target: Target,
    content: ContentConfig | None = None,
) -> str:
    """The conclusion in a few sentences; `content` is the recipe's."""
    if chosen is None:
        return _no_cluster(points, target)
    needed = target.needed_rows_per_s
    kind = "smallest" if chosen.price_per_hour is None else "cheapest"
    lead = (
        f"{chosen.topology} is the {kind} cluster that reaches {human(needed)} rows/s"
        if needed is not None
        else f"{chosen.topology} trains the cheapest rows"
    )
    if target.rows_per_day is not None and chosen.rows_per_s:
        hours = duration(target.rows_per_day / chosen.rows_per_s)
        lead += f": {human(target.rows_per_day)} rows take {hours} of the {target.window_hours:g}h"
    parts = [
        f"{lead}.",
        f"With {chosen.batch_size_per_rank:,} rows a rank it trains about "
        f"{human(chosen.rows_per_s or 0)} rows/s, {1e3 * (chosen.step_s or 0):.3g} ms a step "
        f"({_parts(chosen)}).",
        *_content(chosen, content),
        f"The fullest rank uses {size(chosen.peak_bytes or 0)} of {size(chosen.device_bytes or 0)}"
        f"; {chosen.headroom or 0:.0%} stay free.",
        _future(chosen),
        *_passed_over(points, chosen, target),
    ]
    if chosen.cost_per_billion_rows is not None:
        parts.append(f"A billion rows cost {chosen.cost_per_billion_rows:.2f}.")
    if "calibration" not in (chosen.constants or ""):
        parts.append("Times come from data sheets, not from measurements: calibrate to trust them.")
    return " ".join(parts)


def _parts(point: CapacityPoint) -> str:
    parts = {"tables": point.sparse_s, "dense": point.dense_s, "content": point.content_s}
    return ", ".join(f"{1e3 * s:.3g} ms {name}" for name, s in parts.items() if s is not None)


def _content(point: CapacityPoint, content: ContentConfig | None) -> Iterator[str]:
    if content is None or point.content_items is None:
        return
    service = content.placement
    if not isinstance(service, Service):
        share = point.content_items / point.world_size
        yield f"For content, each rank encodes {share:,.0f} items a step."
        return
    share = point.content_items / service.num_actors
    devices = [
        f"{service.num_actors * each:g} {kind}"
        for each, kind in ((service.gpus_per_actor, "GPUs"), (service.cpus_per_actor, "CPUs"))
        if each
    ]
    needs = f"; they need {' and '.join(devices)} beside the cluster" if devices else ""
    yield (
        f"For content, each of {service.num_actors} actors encodes {share:,.0f} items a step in "
        f"{1e3 * (point.content_actor_s or 0):.3g} ms{needs}."
    )


def _future(point: CapacityPoint) -> str:
    if point.breaks_at_growth is None:
        return "Tables a thousand times as large still fit."
    when = ""
    if point.days_left is not None:
        when = f", {_in_days(point.days_left)} at today's growth"
    spill = ""
    offloads = point.offloads_at_growth
    if offloads is not None and 1 < offloads < 0.9 * point.breaks_at_growth:
        spill = f"From {offloads:.2f} times their rows on, tables spill into host memory. "
    return (
        f"{spill}Tables may grow to {point.breaks_at_growth:.2f} times their rows{when}; then "
        f"{point.breaks_first}."
    )


def _in_days(days: float) -> str:
    """A growth rate says nothing of the next century."""
    return f"in about {days:,.0f} days" if days <= FAR_DAYS else "in more than ten years"


def _passed_over(
    points: Sequence[CapacityPoint], chosen: CapacityPoint, target: Target
) -> Iterator[str]:
    """The cheapest cluster that reaches the target too but lacks memory, where it costs less."""
    if target.needed_rows_per_s is None:
        return
    full = [p for p in today(points) if (p.headroom or 0.0) < MIN_HEADROOM]
    tempting = choose(full, target)
    if tempting is None or _cost_of_cluster(tempting) >= _cost_of_cluster(chosen):
        return
    yield (
        f"{tempting.topology} costs less and would train {human(tempting.rows_per_s or 0)} rows/s, "
        f"but {tempting.headroom or 0:.0%} of its fullest rank's memory would stay free; "
        f"{MIN_HEADROOM:.0%} are asked for."
    )


def _no_cluster(points: Sequence[CapacityPoint], target: Target) -> str:
    fitting = today(points)
    if not fitting:
        refused = next((p for p in reversed(points) if p.refusal), None)
        why = f" {refused.topology}: {refused.refusal}." if refused else ""
        return f"The tables fit none of these clusters.{why}"
    fastest = max(fitting, key=lambda p: p.rows_per_s or 0.0)
    return (
        f"No cluster of the sweep reaches {human(target.needed_rows_per_s or 0)} rows/s: the "
        f"fastest, {fastest.topology} with {fastest.batch_size_per_rank:,} rows a rank, trains "
        f"{human(fastest.rows_per_s or 0)} rows/s; sweep larger clusters or batches."
    )
