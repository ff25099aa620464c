"""From the points of a sweep to the answer: which cluster, how fast, how long it lasts."""

from collections.abc import Iterator, Sequence

from embedding.planning.traffic import MIN_GROWTH_DAYS
from multimodal.content_config import ContentConfig, Service
from pipeline.capacity.types import CapacityPoint, Target
from pipeline.config import Recipe
from pipeline.console import duration, human, size

FAR_DAYS = 3650
"""Further ahead no number of days is said."""
MIN_HEADROOM = 0.05
"""A cluster whose fullest rank or host has less free memory is no recommendation."""


def today(points: Sequence[CapacityPoint]) -> list[CapacityPoint]:
    """Points of the tables as they are now, that fit."""
    return [p for p in points if _is_of_today(p) and p.refusal is None]


def _is_of_today(point: CapacityPoint) -> bool:
    return point.growth == 1 and point.dim_factor == 1


def has_room(point: CapacityPoint) -> bool:
    """Whether so much memory stays free that the cluster can be recommended."""
    return (point.headroom or 0.0) >= MIN_HEADROOM


def choose(points: Sequence[CapacityPoint], target: Target) -> CapacityPoint | None:
    """The cheapest cluster that meets the target: by price an hour, else by ranks.

    Without a target, the one with the cheapest rows; without prices, the most rows per rank. Where
    only some clusters have a price, one of those, as long as one of them meets the target.
    """
    roomy = [p for p in today(points) if has_room(p)] or today(points)
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


def _costs_less(one: CapacityPoint, other: CapacityPoint) -> bool:
    """By the price of both, or by the ranks of both."""
    (by, cost), (other_by, other_cost) = _cost_of_cluster(one), _cost_of_cluster(other)
    return by == other_by and cost < other_cost


def answer_of(
    points: Sequence[CapacityPoint],
    chosen: CapacityPoint | None,
    target: Target,
    recipe: Recipe | None = None,
) -> str:
    """The conclusion in a few sentences; of the recipe, what the sweep changes of it."""
    if chosen is None:
        return _no_cluster(points, target)
    lead = _lead(points, chosen, target)
    trained = target.trained_rows_per_day
    if trained is not None and chosen.rows_per_s:
        hours = duration(trained / chosen.rows_per_s)
        times = f" in {target.epochs} epochs" if target.epochs > 1 else ""
        lead += (
            f": {human(target.rows_per_day or 0)} rows{times} take {hours} of the "
            f"{target.window_hours:g}h"
        )
    parts = [
        f"{lead}.",
        f"With {chosen.batch_size_per_rank:,} rows a rank it trains about "
        f"{human(chosen.rows_per_s or 0)} rows/s, {1e3 * (chosen.step_s or 0):.3g} ms a step "
        f"({_parts(chosen)}), as long as batches arrive: every host has to read and decode "
        f"{human((chosen.rows_per_s or 0) / chosen.num_hosts)} rows/s, which is not counted.",
        *_batch(chosen, recipe),
        *_content(chosen, None if recipe is None else recipe.content),
        *_memory(chosen),
        _future(chosen),
        *_passed_over(points, chosen, target),
        *_not_compared(points, chosen),
    ]
    if chosen.cost_per_billion_rows is not None:
        parts.append(f"A billion rows cost {chosen.cost_per_billion_rows:.2f}.")
    if "calibration" not in (chosen.constants or ""):
        parts.append("Times come from data sheets, not from measurements: calibrate to trust them.")
    return " ".join(parts)


def _lead(points: Sequence[CapacityPoint], chosen: CapacityPoint, target: Target) -> str:
    needed, priced = target.needed_rows_per_s, chosen.price_per_hour is not None
    among = " of the clusters with a price" if priced and _unpriced(points) else ""
    if needed is not None:
        kind = "cheapest" if priced else "smallest"
        which = f"{kind}{among or ' cluster'}"
        return f"{chosen.topology} is the {which} that reaches {human(needed)} rows/s"
    if priced:
        return f"{chosen.topology} trains the cheapest rows{among}"
    return f"{chosen.topology} trains the most rows a rank"


def _batch(chosen: CapacityPoint, recipe: Recipe | None) -> Iterator[str]:
    """A learning rate suits a number of rows a step: other clusters have other numbers."""
    if recipe is None:
        return
    ranks, batch = recipe.cluster.num_workers, recipe.ranking.trainer.batch_size_per_rank
    rows = chosen.world_size * chosen.batch_size_per_rank
    if rows != ranks * batch:
        yield (
            f"A step takes {rows:,} rows, the recipe's {ranks * batch:,} ({ranks} x {batch:,}): "
            "learning rates may have to change."
        )


def _memory(point: CapacityPoint) -> Iterator[str]:
    used, whole = point.peak_bytes or 0, point.device_bytes or 1
    if point.host_headroom is None:
        yield (
            f"The fullest rank uses {size(used)} of {size(whole)}; {point.headroom or 0:.0%} stay "
            "free."
        )
        return
    yield (
        f"The fullest rank uses {size(used)} of {size(whole)}, and {1 - used / whole:.0%} stay "
        f"free; in the memory of its host tables and their copy take {size(point.host_bytes or 0)}"
        f", and {point.host_headroom:.0%} stay free."
    )


def _fullest(point: CapacityPoint) -> str:
    """What has the least free memory."""
    host = point.host_headroom
    return "fullest " + ("host" if host is not None and host == point.headroom else "rank")


def _unpriced(points: Sequence[CapacityPoint]) -> list[str]:
    """Machines without a price that the tables fit on."""
    return sorted({p.machine for p in today(points) if p.price_per_hour is None})


def _not_compared(points: Sequence[CapacityPoint], chosen: CapacityPoint) -> Iterator[str]:
    """Machines that a price hides."""
    unpriced = _unpriced(points)
    if chosen.price_per_hour is None or not unpriced:
        return
    has, those = ("has", "it") if len(unpriced) == 1 else ("have", "them")
    yield (
        f"{', '.join(unpriced)} {has} no price and could be cheaper: give {those} a --price to "
        "compare all."
    )


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
    elif point.traffic_days is not None:
        when = (
            f" (in how many days is not known: traffic of {point.traffic_days} of at least "
            f"{MIN_GROWTH_DAYS} days; measure more, or give --growth-per-day)"
        )
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
    tempting = choose([p for p in today(points) if not has_room(p)], target)
    if tempting is None or not _costs_less(tempting, chosen):
        return
    yield (
        f"{tempting.topology} costs less and would train {human(tempting.rows_per_s or 0)} rows/s, "
        f"but {tempting.headroom or 0:.0%} of its {_fullest(tempting)}'s memory would stay free; "
        f"{MIN_HEADROOM:.0%} are asked for."
    )


def _no_cluster(points: Sequence[CapacityPoint], target: Target) -> str:
    fitting = today(points)
    if not fitting:
        refused = next((p for p in reversed(points) if p.refusal and _is_of_today(p)), None)
        why = f" {refused.topology}: {refused.refusal}." if refused else ""
        return f"The tables fit none of these clusters.{why}"
    needed = human(target.needed_rows_per_s or 0)
    tight = choose([p for p in fitting if not has_room(p)], target)
    fastest = max([p for p in fitting if has_room(p)] or fitting, key=lambda p: p.rows_per_s or 0.0)
    which = f" with {MIN_HEADROOM:.0%} of its memory free" if tight else ""
    said = (
        f"No cluster of the sweep{which} reaches {needed} rows/s: the fastest, {_at(fastest)}, "
        f"trains {human(fastest.rows_per_s or 0)} rows/s; sweep larger clusters or batches."
    )
    if tight is None:
        return said
    return (
        f"{said} {_at(tight)} reaches it with {human(tight.rows_per_s or 0)} rows/s, but "
        f"{tight.headroom or 0:.0%} of its {_fullest(tight)}'s memory would stay free."
    )


def _at(point: CapacityPoint) -> str:
    return f"{point.topology} with {point.batch_size_per_rank:,} rows a rank"
