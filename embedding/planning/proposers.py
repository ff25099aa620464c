"""Proposals of a choice for every table, for `embedding.planning.search` to place and compare.

All judge a choice by its mean cost over the ranks, as if the load could be balanced perfectly:
a lower bound of what it costs in a placement.
"""

# Shapes: T tables, C choices of a table.

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from embedding.planning.choices import SHARDING_TYPES, TABLE_COLUMN_WISE, Choice
from embedding.planning.cost import CostModel

Options = Mapping[str, Sequence[Choice]]
"""Allowed choices of every table."""
Proposal = dict[str, Choice]

BUDGETS = (1.0, 0.95, 0.9, 0.8)
LOW_BUDGETS = (0.65, 0.5, 0.35)
"""Where nothing fits otherwise: large pieces leave gaps, and some tables must go to host memory."""
_BINS = 2000
_MAX_SUBSETS = 12


def mean_seconds(model: CostModel, table: str, choice: Choice) -> float:
    """Cost of a choice spread evenly over all ranks, without its group."""
    return model.price(table, choice).mean_s


def total_bytes(model: CostModel, table: str, choice: Choice) -> float:
    """Device bytes of a choice on all ranks together."""
    priced = model.price(table, choice)
    everyone = priced.everyone_bytes * model.shape.world_size
    return everyone + priced.owner_bytes * model.num_owners(choice)


def uniform(options: Options, model: CostModel) -> Iterator[tuple[str, Proposal]]:
    """By sharding type: every table that way, where it can; its cheapest way elsewhere."""
    for sharding in SHARDING_TYPES:
        if not any(c.sharding == sharding for choices in options.values() for c in choices):
            continue
        proposal = {}
        for table, choices in options.items():
            same = [c for c in choices if c.sharding == sharding] or choices
            proposal[table] = min(same, key=lambda c, t=table: mean_seconds(model, t, c))  # type: ignore[misc]
        yield sharding, proposal


def grid(options: Options, model: CostModel) -> Iterator[Proposal]:
    """The cheapest choice of every table for every set of sharding types, best sets first.

    A set with fewer types saves calls; a set with more suits more tables.
    """
    used = [
        s
        for s in SHARDING_TYPES
        if s != TABLE_COLUMN_WISE
        and any(c.sharding == s for choices in options.values() for c in choices)
    ]
    scored: list[tuple[float, int, Proposal]] = []
    for size in range(1, len(used) + 1):
        for subset in itertools.combinations(used, size):
            proposal = _cheapest(options, model, set(subset))
            scored.append((_lower_bound(model, proposal), len(scored), proposal))
    scored.sort(key=lambda entry: entry[:2])
    seen: list[Proposal] = []
    for _, _, proposal in scored:
        if proposal not in seen:
            seen.append(proposal)
            yield proposal
        if len(seen) == _MAX_SUBSETS:
            return


def _cheapest(options: Options, model: CostModel, allowed: set[str]) -> Proposal:
    proposal = {}
    for table, choices in options.items():
        inside = [c for c in choices if c.sharding in allowed] or choices
        proposal[table] = min(inside, key=lambda c, t=table: mean_seconds(model, t, c))  # type: ignore[misc]
    return proposal


def _lower_bound(model: CostModel, proposal: Proposal) -> float:
    groups = {model.group_of(table, choice) for table, choice in proposal.items()}
    calls = sum(float(model.group_seconds(key).sum()) for key in groups)
    return calls + sum(mean_seconds(model, table, choice) for table, choice in proposal.items())


def dynamic_programming(
    options: Options, model: CostModel, budgets: Sequence[float] = BUDGETS
) -> Iterator[Proposal]:
    """The cheapest choices whose bytes together fit a budget, for each share of all memory.

    A knapsack over the memory of all ranks; smaller budgets leave room for uneven ranks.
    """
    capacity = model.device_capacity * model.shape.world_size
    if capacity <= 0:
        return
    tables = list(options)
    best = np.full(_BINS + 1, np.inf)
    best[0] = 0.0
    picks = np.zeros((len(tables), _BINS + 1), dtype=np.int32)
    sizes = []
    for index, table in enumerate(tables):
        after = np.full(_BINS + 1, np.inf)
        bins_C = []
        for number, choice in enumerate(options[table]):
            bins = round(total_bytes(model, table, choice) / capacity * _BINS)
            bins_C.append(bins)
            if bins > _BINS:
                continue
            shifted = np.full(_BINS + 1, np.inf)
            shifted[bins:] = best[: _BINS + 1 - bins] + mean_seconds(model, table, choice)
            better = shifted < after
            after[better] = shifted[better]
            picks[index][better] = number
        sizes.append(bins_C)
        best = after
    for share in budgets:
        reachable = best[: int(share * _BINS) + 1]
        if not np.isfinite(reachable).any():
            continue
        yield _follow(options, tables, picks, sizes, int(reachable.argmin()))


def _follow(
    options: Options, tables: list[str], picks: np.ndarray, sizes: list[list[int]], end: int
) -> Proposal:
    proposal: Proposal = {}
    for index in range(len(tables) - 1, -1, -1):
        number = int(picks[index][end])
        proposal[tables[index]] = options[tables[index]][number]
        end -= sizes[index][number]
    return {table: proposal[table] for table in tables}


def smallest(options: Options, model: CostModel) -> Proposal:
    """The choice of every table that needs the least memory on its fullest rank, then least time.

    What is placed when nothing else fits, and what a refusal is measured by.
    """
    proposal = {}
    for table, choices in options.items():
        proposal[table] = min(
            choices,
            key=lambda c, t=table: (  # type: ignore[misc]
                round(total_bytes(model, t, c)),
                model.price(t, c).owner_bytes,
                mean_seconds(model, t, c),
            ),
        )
    return proposal
