"""The search for the cheapest plan: proposals, placed, improved by local search, compared.

Deterministic: nothing is drawn at random, and ties go to the first in the schema's order.
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from embedding.planning.choices import UVM, UVM_CACHING, Choice
from embedding.planning.cost import CostModel, Placed
from embedding.planning.layout import Layout, layout_of
from embedding.planning.proposers import (
    LOW_BUDGETS,
    Options,
    Proposal,
    dynamic_programming,
    grid,
    mean_seconds,
    smallest,
    uniform,
)

EXHAUSTIVE_LIMIT = 5000
"""Placements that are all tried instead of searched."""
Tables = tuple[int, ...]
"""By number; one that has several units there occurs so often."""
CanonicalForm = tuple[tuple[Choice, ...], tuple[tuple[Tables, tuple[Tables, ...]], ...]]
"""Choices of all tables; for every host the tables on it, and those on each of its ranks."""
_REFINED = 4
_MAX_PASSES = 12
_MIN_GAIN = 1e-4
"""Relative gain of a pass below which improving stops."""


@dataclass(frozen=True)
class Found:
    """The best plan of a search."""

    placement: dict[str, Placed]
    cost_s: float
    proposer: str
    search_s: float
    shortlist: tuple[dict[str, Placed], ...]
    """The cheapest distinct placements that were met, `placement` first."""


def search(
    model: CostModel,
    options: Options,
    *,
    pinned: Mapping[str, Placed] | None = None,
    starts: Mapping[str, Mapping[str, Placed]] | None = None,
    keep: int = 1,
) -> Found | None:
    """The cheapest placement of all tables that fits, or None.

    Args:
        model: prices and memory.
        options: allowed choices of every table that is not pinned.
        pinned: tables that stay where they are.
        starts: placements to begin from as well, by name; tables that one lacks are added to it.
        keep: length of the shortlist, if so many different placements are met.
    """
    began = time.perf_counter()
    base = layout_of(model, pinned or {})
    candidates: list[tuple[float, int, str, Layout]] = []

    def offer(name: str, layout: Layout | None) -> None:
        cost = layout.cost() if layout is not None and layout.fits() else math.inf
        if layout is not None and math.isfinite(cost):
            candidates.append((cost, len(candidates), name, layout))

    if _num_placements(options, model) <= EXHAUSTIVE_LIMIT:
        for layout in _all_layouts(base, options):
            offer("exhaustive", layout)
    else:
        for name, proposed in _proposed(base, model, options):
            offer(name, proposed)
    for name, placement in (starts or {}).items():
        offer(name, _completed(layout_of(model, {**placement, **(pinned or {})}), options))
    if not candidates:
        return None
    candidates.sort(key=lambda entry: entry[:2])
    improved = [
        (_improve(layout.copy(), options), order, name)
        for _, order, name, layout in candidates[:_REFINED]
    ]
    improved.sort(key=lambda entry: (entry[0].cost(), entry[1]))
    best, _, name = improved[0]
    met = [*(layout for layout, _, _ in improved), *(entry[3] for entry in candidates)]
    return Found(
        placement={table: best.placement[table] for table in model.loads},
        cost_s=best.cost(),
        proposer=name if options else "pinned",
        search_s=time.perf_counter() - began,
        shortlist=tuple(_cheapest_distinct(met, keep)),
    )


def _completed(layout: Layout, options: Options) -> Layout | None:
    """With the missing tables, each where it lengthens the step by the least; None: no room."""
    for table in options:
        if table in layout.placement:
            continue
        placed = _best_placed(layout, table, options[table])
        if placed is None:
            return None
        layout.add(table, placed)
    return layout


def _cheapest_distinct(met: Sequence[Layout], keep: int) -> Iterator[dict[str, Placed]]:
    """The first of `met`, then the cheapest ones that no renaming of ranks makes equal."""
    seen: set[CanonicalForm] = set()
    for layout in (met[0], *sorted(met[1:], key=Layout.cost)):
        placement = {table: layout.placement[table] for table in layout.model.loads}
        form = canonical(placement.values(), layout.model.shape.ranks_per_host)
        if form not in seen:
            seen.add(form)
            yield placement
        if len(seen) == keep:
            return


def canonical(combination: Iterable[Placed], ranks_per_host: int) -> CanonicalForm:
    """Equal for placements that differ by the names of hosts, and of ranks within a host, only.

    Column shards of a table are alike, so of every place their number counts.
    """
    choices: list[Choice] = []
    on_host: dict[int, list[int]] = {}
    on_rank: dict[int, dict[int, list[int]]] = {}
    for table, (choice, targets) in enumerate(combination):
        choices.append(choice)
        for target in targets:
            match choice.domain:
                case "host":
                    on_host.setdefault(target, []).append(table)
                case "rank":
                    ranks = on_rank.setdefault(target // ranks_per_host, {})
                    ranks.setdefault(target, []).append(table)
                case "all":
                    pass
    hosts = sorted(
        (tuple(on_host.get(host, ())), tuple(sorted(map(tuple, on_rank.get(host, {}).values()))))
        for host in on_host.keys() | on_rank.keys()
    )
    return tuple(choices), tuple(hosts)


def _proposed(
    base: Layout, model: CostModel, options: Options
) -> Iterator[tuple[str, Layout | None]]:
    none_fits = True
    for name, proposal in itertools.chain(
        (("grid", proposal) for proposal in grid(options, model)),
        (("uniform", proposal) for _, proposal in uniform(options, model)),
        (("dynamic_programming", p) for p in dynamic_programming(options, model)),
    ):
        layout = _place(base, options, proposal)
        none_fits &= layout is None
        yield name, layout
    layout = _greedy(base, model, options)
    yield "greedy", layout
    if none_fits and layout is None:
        # Improving does not find the way back from the smallest choices of all tables.
        for proposal in dynamic_programming(options, model, LOW_BUDGETS):
            yield "dynamic_programming", _place(base, options, proposal)
    yield "dynamic_programming", _place(base, options, smallest(options, model))


def placed_order(model: CostModel, proposal: Proposal) -> list[str]:
    """Tables with the largest pieces first: small ones fill the gaps they leave."""
    capacity = max(model.device_capacity, 1.0)
    weights = {}
    for table, choice in proposal.items():
        priced = model.price(table, choice)
        weights[table] = (priced.owner_bytes / capacity, float(priced.owner_s.sum()))
    seconds = sum(s for _, s in weights.values()) / model.shape.world_size or 1.0
    return sorted(proposal, key=lambda t: -max(weights[t][0], weights[t][1] / seconds))


def _place(base: Layout, options: Options, proposal: Proposal) -> Layout | None:
    """Targets for a proposal; a table that fits nowhere takes its next choice that does."""
    layout = base.copy()
    model = layout.model
    for table in placed_order(model, proposal):
        choice = proposal[table]
        targets = layout.best_targets(table, choice)
        if targets is None:
            others = sorted(options[table], key=lambda c, t=table: mean_seconds(model, t, c))  # type: ignore[misc]
            found = ((c, layout.best_targets(table, c)) for c in others)
            choice, targets = next(((c, t) for c, t in found if t is not None), (choice, None))
        if targets is None:
            return None
        layout.add(table, Placed(choice, targets))
    return layout


def _greedy(base: Layout, model: CostModel, options: Options) -> Layout | None:
    """Largest table first, each the way that makes the step longest by the least."""
    layout = base.copy()
    cheapest = {
        table: min(choices, key=lambda c, t=table: mean_seconds(model, t, c))  # type: ignore[misc]
        for table, choices in options.items()
    }
    for table in placed_order(model, cheapest):
        placed = _best_placed(layout, table, options[table])
        if placed is None:
            return None
        layout.add(table, placed)
    return layout


def _best_placed(layout: Layout, table: str, choices: Sequence[Choice]) -> Placed | None:
    best: tuple[float, Placed] | None = None
    for choice in choices:
        targets = layout.best_targets(table, choice)
        if targets is None:
            continue
        placed = Placed(choice, targets)
        # The mean cost counts a little: two choices that the slowest rank hides are not equal.
        cost = layout.cost_with(table, placed) + 1e-3 * mean_seconds(layout.model, table, choice)
        if best is None or cost < best[0]:
            best = (cost, placed)
    return None if best is None else best[1]


def _improve(layout: Layout, options: Options) -> Layout:
    """Move one table at a time to its best place until a pass gains nothing."""
    cost = layout.cost()
    for _ in range(_MAX_PASSES):
        before = cost
        for table in options:
            worth = _worth_trying(layout, table, options[table])
            if not worth:
                continue
            old = layout.remove(table)
            new = _best_placed(layout, table, worth)
            if new is not None and new != old and layout.cost_with(table, new) < cost - 1e-12:
                layout.add(table, new)
                cost = layout.cost()
            else:
                layout.add(table, old)
        if before - cost < _MIN_GAIN * before:
            break
    return layout


def _worth_trying(layout: Layout, table: str, choices: Sequence[Choice]) -> list[Choice]:
    """Choices that could shorten the step at all.

    A choice with a higher mean cost can only pay through balance or by leaving a group unused.
    """
    model, current = layout.model, layout.placement[table].choice
    key = model.group_of(table, current)
    gain = layout.slack() + (model.group_price(key) if layout.groups[key] == 1 else 0.0)
    limit = mean_seconds(model, table, current) + gain
    return [choice for choice in choices if mean_seconds(model, table, choice) < limit]


def _num_placements(options: Options, model: CostModel) -> int:
    total = 1
    for choices in options.values():
        total *= sum(_num_targets(choice, model) for choice in choices)
        if total > EXHAUSTIVE_LIMIT:
            break
    return total


def _num_targets(choice: Choice, model: CostModel) -> int:
    places = {"all": 1, "host": model.shape.num_hosts, "rank": model.shape.world_size}
    return int(places[choice.domain] ** choice.num_units)


def all_placed(choice: Choice, model: CostModel) -> Iterator[Placed]:
    """A choice on all possible targets."""
    places = {"all": 1, "host": model.shape.num_hosts, "rank": model.shape.world_size}
    per_host = model.shape.ranks_per_host
    for targets in itertools.product(range(places[choice.domain]), repeat=choice.num_units):
        if choice.one_host and len({target // per_host for target in targets}) > 1:
            continue
        yield Placed(choice, targets)


def _all_layouts(base: Layout, options: Options) -> Iterator[Layout]:
    model = base.model
    tables = list(options)
    ways = [[placed for c in options[t] for placed in all_placed(c, model)] for t in tables]
    for combination in itertools.product(*ways):
        layout = base.copy()
        for table, placed in zip(tables, combination, strict=True):
            layout.add(table, placed)
        yield layout


def fits_somehow(model: CostModel, options: Options) -> bool:
    """Whether any placement is found that fits; much faster than the search."""
    base, options = Layout(model), _without_caches(options)
    if _place(base, options, smallest(options, model)) is not None:
        return True
    alike = (proposal for _, proposal in uniform(options, model))
    proposals = itertools.chain(dynamic_programming(options, model), alike)
    return any(_place(base, options, proposal) is not None for proposal in proposals)


def _without_caches(options: Options) -> dict[str, list[Choice]]:
    """Host memory without a cache needs no more of any memory than with one."""
    return {
        table: [
            choice
            for choice in choices
            if choice.kernel != UVM_CACHING
            or Choice(choice.sharding, UVM, choice.column_shards) not in choices
        ]
        for table, choices in options.items()
    }


def layout_of_proposal(
    model: CostModel, options: Options, proposal: Proposal
) -> dict[str, Placed] | None:
    """A proposal placed without further search; None if it does not fit."""
    layout = _place(Layout(model), options, proposal)
    return None if layout is None else {table: layout.placement[table] for table in model.loads}
