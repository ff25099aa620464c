"""Planning: a schema on a cluster -> the cheapest plan that fits, or a sentence why none does."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.planning.calibration import constants_for
from embedding.planning.choices import FUSED, KERNELS, UVM, UVM_CACHING, Choice, choices_of
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.cost import CostModel, Placed
from embedding.planning.demand import StepSettings
from embedding.planning.id_distribution import DEFAULT_EXPONENT
from embedding.planning.plan_description import PlanDescription
from embedding.planning.prediction import (
    describe,
    placement_of,
    refuse_other_sizes,
    refuse_other_tables,
)
from embedding.planning.proposers import Options
from embedding.planning.search import Found, search
from embedding.planning.traffic import Traffic
from embedding.planning.workload import TableLoad, table_loads

logger = logging.getLogger(__name__)

TIGHT_SHARE = 0.85
"""Where tables fill more of the memory than this, moving some to host memory is tried too."""


@dataclass(frozen=True)
class PlanRequest:
    """Everything a plan depends on; equal requests give equal plans, in any process."""

    schema: FeatureSchema
    shape: ClusterShape
    settings: StepSettings
    calibration: Path | None = None
    """Measured constants; without a file the data sheet's."""
    tables_path: str = "tables"
    """Path of the `EmbeddingTables` in the module that is sharded."""
    traffic: Traffic | None = None
    kernels: tuple[str, ...] = (FUSED, UVM, UVM_CACHING)
    """Kernels of sharded tables that may be used on CUDA."""
    exponent: float = DEFAULT_EXPONENT
    """Of Zipf's law, for tables without measured traffic."""
    pinned: PlanDescription | None = None
    """Tables of this plan stay where it puts them."""
    reserved_bytes: float | None = None
    """Of every rank, for everything but tables; by default a share."""
    reserved_host_bytes: float = 0.0
    """Of every host of GPUs, for copies that a checkpoint writes of anything but tables."""

    def loads(self) -> list[TableLoad]:
        """Lookups of every table."""
        return table_loads(self.schema, self.traffic, self.exponent)

    def model(self) -> CostModel:
        """Prices on this cluster."""
        constants = constants_for(self.shape, self.calibration)
        reserved = self.reserved_bytes, self.reserved_host_bytes
        return CostModel(self.loads(), self.shape, self.settings, constants, *reserved)


def plan_tables(
    request: PlanRequest, starts: Mapping[str, PlanDescription] | None = None
) -> PlanDescription:
    """The cheapest plan by the cost model.

    Args:
        request: tables, cluster, batch, constants.
        starts: plans to begin from as well, by name; the result is never worse than these. Tables
            that they place as the request does not allow are placed anew.

    Raises:
        UserError: No plan fits, or a forced or pinned placement cannot be made; with the remedy.
    """
    model = request.model()
    found = _found(request, model, starts)
    return describe(model, found.placement, found.proposer, request.tables_path)


def shortlist_plans(request: PlanRequest, count: int) -> list[PlanDescription]:
    """The `count` cheapest different plans that the search met, the cheapest first.

    Raises:
        UserError: As `plan_tables`.
    """
    model = request.model()
    return [
        describe(model, placement, f"shortlist {number}", request.tables_path)
        for number, placement in enumerate(_found(request, model, keep=count).shortlist, start=1)
    ]


def _found(
    request: PlanRequest,
    model: CostModel,
    starts: Mapping[str, PlanDescription] | None = None,
    *,
    keep: int = 1,
) -> Found:
    found = find_plan(request, model, starts, keep=keep)
    if found is None:
        from embedding.planning.refusal import refusal

        raise refusal(request)
    return found


def find_plan(
    request: PlanRequest,
    model: CostModel,
    starts: Mapping[str, PlanDescription] | None = None,
    *,
    keep: int = 1,
) -> Found | None:
    """The search behind `plan_tables`; None if nothing fits."""
    loads = list(model.loads.values())
    pinned = _pinned(request, loads)
    allowed = _options(request, loads, pinned, request.kernels)
    begun = {
        name: _allowed_part(name, placement_of(plan, loads, request.shape), loads, allowed)
        for name, plan in (starts or {}).items()
    }
    # Tables in device memory are never slower, so host memory comes in only where it is needed.
    inside = _options(request, loads, pinned, (FUSED,))
    found = None
    if FUSED in request.kernels:
        found = search(model, inside, pinned=pinned, starts=begun, keep=keep)
    if found is not None and not _is_tight(model, found):
        return found
    if allowed == inside:
        return found
    begun |= {found.proposer: found.placement} if found is not None else {}
    offloaded = search(model, allowed, pinned=pinned, starts=begun, keep=keep)
    if found is None or offloaded is None:
        return found or offloaded
    both = found.search_s + offloaded.search_s
    return replace(min(offloaded, found, key=lambda f: f.cost_s), search_s=both)


def _allowed_part(
    name: str, placement: Mapping[str, Placed], loads: list[TableLoad], options: Options
) -> dict[str, Placed]:
    """A start without the tables that it places as the request does not allow."""
    kept, refused = {}, []
    for load in loads:
        placed = placement.get(load.name)
        if placed is None:
            continue
        if load.name not in options or _is_allowed(placed.choice, load, options[load.name]):
            kept[load.name] = placed
        else:
            refused.append(f"{load.name} {placed.choice}")
    if refused:
        logger.warning(
            "the plan %s begins with %s, which kernels and shardings that are asked for do not "
            "allow: these tables are placed anew",
            *(name, ", ".join(refused)),
        )
    return kept


def _is_allowed(choice: Choice, load: TableLoad, options: Sequence[Choice]) -> bool:
    """Of a table without a forced sharding, any number of column shards and size of a cache is."""
    same = [c for c in options if (c.sharding, c.kernel) == (choice.sharding, choice.kernel)]
    if load.table.sharding is None:
        return bool(same)
    return any(c.column_shards == choice.column_shards for c in same)


def check_trainable(plan: PlanDescription, schema: FeatureSchema) -> None:
    """Refuse a plan that training cannot use: of other tables, or with an unknown kernel.

    Raises:
        UserError: It names the tables.
    """
    refuse_other_tables(plan, {table.name for table in schema.tables})
    refuse_other_sizes(plan, schema)
    unknown = {entry.table: entry.kernel for entry in plan.tables if entry.kernel not in KERNELS}
    if unknown:
        raise UserError(
            f"the plan has tables with kernels that training lacks ({unknown}); plan again with "
            f"some of {', '.join(KERNELS)}"
        )
    missing = [table.name for table in schema.tables if plan.table(table.name) is None]
    if missing:
        raise UserError(
            f"the plan misses the tables {missing}; plan again for this recipe, or pin it with "
            "`braid plan --pin` to place the rest"
        )


def _pinned(request: PlanRequest, loads: list[TableLoad]) -> dict[str, Placed]:
    if request.pinned is None:
        return {}
    return placement_of(request.pinned, loads, request.shape)


def _options(
    request: PlanRequest,
    loads: list[TableLoad],
    pinned: Mapping[str, Placed],
    kernels: tuple[str, ...],
) -> dict[str, list[Choice]]:
    options = {
        load.name: choices_of(load, request.shape, kernels)
        for load in loads
        if load.name not in pinned
    }
    empty = [table for table, choices in options.items() if not choices]
    if empty:
        raise UserError(
            f"tables {empty} have no kernel among {list(request.kernels)} that can hold them; "
            "allow more kernels"
        )
    return options


def _is_tight(model: CostModel, found: Found) -> bool:
    capacity = model.device_capacity * model.shape.world_size
    used = 0.0
    for table, (choice, _) in found.placement.items():
        priced = model.price(table, choice)
        used += priced.everyone_bytes * model.shape.world_size
        used += priced.owner_bytes * model.num_owners(choice)
    return used > TIGHT_SHARE * capacity
