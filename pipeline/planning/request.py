"""From a recipe to what planning needs. Imports nothing heavy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from embedding.config import (
    ColumnWise,
    DataParallel,
    Grid,
    RowWise,
    Sharding,
    TableColumnWise,
    TableRowWise,
    TableWise,
)
from embedding.errors import UserError, nearest_name
from embedding.feature_schema import FeatureSchema
from embedding.limits import check_support
from embedding.planning.calibration import read_calibration
from embedding.planning.choices import KERNELS
from embedding.planning.cluster_shape import ClusterShape, limited
from embedding.planning.demand import step_settings
from embedding.planning.plan_description import PlanDescription, read_plan
from embedding.planning.planner import PlanRequest, check_trainable, plan_tables
from embedding.planning.traffic import Traffic, read_traffic
from pipeline.config import Recipe
from pipeline.planning.reserve import with_reserve
from ranking.compatibility import table_widths

TABLES_PATH = "model.tables"
"""Where the module that is sharded, a `RankingStep`, holds its `EmbeddingTables`."""

_WHOLE: dict[str, type[DataParallel | TableWise | RowWise | TableRowWise]] = {
    "data_parallel": DataParallel,
    "table_wise": TableWise,
    "row_wise": RowWise,
    "table_row_wise": TableRowWise,
}
_KINDS = (*_WHOLE, "column_wise", "table_column_wise", "grid")


def plan_request(recipe: Recipe, shape: ClusterShape) -> PlanRequest:
    """A request for the recipe's tables on a cluster, with its own files and limits.

    Without the room that its content needs (`pipeline.planning.reserve`).
    """
    sharding = recipe.embedding.sharding
    return PlanRequest(
        schema=table_widths(recipe.features, recipe.ranking.model),
        shape=limited(shape, sharding.hbm_gib),
        settings=replace(
            step_settings(
                recipe.ranking.trainer.batch_size_per_rank, recipe.embedding.optimizer, sharding
            ),
            copies_for_checkpoints=True,
        ),
        calibration=sharding.calibration,
        tables_path=TABLES_PATH,
        traffic=measured_traffic(recipe),
        kernels=sharding.kernels,
    )


def measured_traffic(recipe: Recipe) -> Traffic | None:
    """What the recipe's traffic file says of its tables.

    Raises:
        UserError: The file is missing, something else or of other tables.
    """
    path = recipe.embedding.sharding.traffic
    return None if path is None else read_traffic(path, recipe.features)


def left_out(recipe: Recipe, pin: Path | None) -> str | None:
    """A line about the recipe's own plan, which `braid plan` makes another one beside.

    Args:
        recipe: what is planned.
        pin: plan that is kept, if any.
    """
    own = recipe.embedding.sharding.plan
    if own is None or own == pin:
        return None
    return (
        f"embedding.sharding.plan={own}, which `braid run` trains with, is left out; --pin {own} "
        "keeps its tables in their places"
    )


def with_traffic(recipe: Recipe, path: Path | None) -> Recipe:
    """The recipe with another traffic file, if one is given."""
    if path is None:
        return recipe
    sharding = recipe.embedding.sharding.model_copy(update={"traffic": path})
    embedding = recipe.embedding.model_copy(update={"sharding": sharding})
    return recipe.model_copy(update={"embedding": embedding})


def check_plan_files(recipe: Recipe) -> None:
    """Refuse plan, calibration and traffic files that the plan stage would, before any stage runs.

    Raises:
        UserError: A file is missing, or something else, or of other tables or ranks.
    """
    sharding = recipe.embedding.sharding
    if sharding.calibration is not None:
        read_calibration(sharding.calibration)
    measured_traffic(recipe)
    if sharding.plan is None:
        return
    plan, num_workers = read_plan(sharding.plan), recipe.cluster.num_workers
    check_trainable(plan, table_widths(recipe.features, recipe.ranking.model))
    if plan.world_size != num_workers:
        raise UserError(
            f"embedding.sharding.plan: {sharding.plan} is for {plan.world_size} ranks and "
            f"cluster.num_workers is {num_workers}; `braid plan --json {sharding.plan}` without "
            f"--topology plans for those, or set cluster.num_workers={plan.world_size}"
        )


def parse_constraints(texts: Iterable[str], schema: FeatureSchema) -> dict[str, Sharding]:
    """Forced sharding types, by table: `table=row_wise`, `table=column_wise:4` (column shards).

    Raises:
        UserError: No such table or sharding type.
    """
    return dict(_constraint(text, schema) for text in texts)


def known_kernels(names: Sequence[str]) -> tuple[str, ...]:
    """The same names.

    Raises:
        UserError: One is no kernel.
    """
    for name in names:
        if name not in KERNELS:
            hint = nearest_name(name, KERNELS)
            raise UserError(f"--kernel {name!r} is unknown{hint}; use {', '.join(KERNELS)}")
    return tuple(names)


def with_constraints(request: PlanRequest, forced: Mapping[str, Sharding]) -> PlanRequest:
    """The request with some tables' sharding types forced."""
    tables = tuple(
        table.model_copy(update={"sharding": forced.get(table.name, table.sharding)})
        for table in request.schema.tables
    )
    return replace(request, schema=request.schema.model_copy(update={"tables": tables}))


def _constraint(text: str, schema: FeatureSchema) -> tuple[str, Sharding]:
    table, separator, kind = text.partition("=")
    names = [config.name for config in schema.tables]
    if not separator:
        raise UserError(f"--constraint {text!r}: write it as table=row_wise")
    if table not in names:
        raise UserError(
            f"--constraint {text!r}: there is no table {table!r}{nearest_name(table, names)}; "
            f"tables are {', '.join(names)}"
        )
    kind, _, count = kind.partition(":")
    if kind in _WHOLE and not count:
        return table, _WHOLE[kind]()
    shards = int(count) if count.isdigit() and int(count) else None if count else 2
    if shards is not None:
        match kind:
            case "column_wise":
                return table, ColumnWise(num_shards=shards)
            case "table_column_wise":
                return table, TableColumnWise(num_shards=shards)
            case "grid" | "grid_shard":
                return table, Grid(num_column_shards=shards)
    raise UserError(
        f"--constraint {text!r}: {kind!r} is no sharding type{nearest_name(kind, _KINDS)}; types "
        f"are {', '.join(_KINDS)}, the last three with :N column shards if not 2"
    )


@dataclass(frozen=True)
class RequestChanges:
    """What the command line changes of a recipe's request."""

    constraints: Mapping[str, Sharding] = field(default_factory=dict)
    """By table."""
    pin: Path | None = None
    calibration: Path | None = None
    traffic: Path | None = None
    batch_size_per_rank: int | None = None
    kernels: tuple[str, ...] | None = None
    also_torchrec: bool = False


def changed_request(recipe: Recipe, shape: ClusterShape, changes: RequestChanges) -> PlanRequest:
    """The recipe's request with the command line's changes, and room for its content.

    Raises:
        UserError: A traffic, calibration or plan file is missing, or is none, or there is no room.
    """
    recipe = with_traffic(recipe, changes.traffic)
    request = plan_request(recipe, shape)
    request = with_constraints(request, changes.constraints)
    if changes.kernels is not None:
        request = replace(request, kernels=changes.kernels)
    if changes.batch_size_per_rank is not None:
        settings = replace(request.settings, batch_size_per_rank=changes.batch_size_per_rank)
        request = replace(request, settings=settings)
    if changes.calibration is not None:
        request = replace(request, calibration=changes.calibration)
    if changes.pin is not None:
        request = replace(request, pinned=read_plan(changes.pin))
    return with_reserve(request, recipe)


def plan_with(recipe: Recipe, shape: ClusterShape, changes: RequestChanges) -> PlanDescription:
    """Plan a recipe's tables on a topology as the command line asks.

    Raises:
        UserError: No plan fits, or something asked for cannot be made.
    """
    request = changed_request(recipe, shape, changes)
    check_support(
        request.schema,
        request.settings.optimizer,
        recipe.embedding.sharding.model_copy(update={"kernels": request.kernels}),
        shape.machine.device,
    )
    starts = {}
    if changes.also_torchrec:
        from pipeline.planning.torchrec_plan import torchrec_plan_of

        starts["torchrec"] = torchrec_plan_of(recipe, request)
    return plan_tables(request, starts)
