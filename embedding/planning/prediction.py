"""From a placement of the search to a plain plan with its prediction, and back."""

# Shapes: P phases, W ranks, M kinds of bytes.

from collections.abc import Mapping, Sequence

import numpy as np

from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.limits import ELEMENT_BYTES
from embedding.planning.choices import Choice, shards_of
from embedding.planning.cluster_shape import ClusterShape
from embedding.planning.cost import CostModel, Placed, Usage, usage_of
from embedding.planning.plan_description import (
    BYTE_KINDS,
    HOST_BYTE_KINDS,
    PHASES,
    PlanDescription,
    Prediction,
    RankPrediction,
    ShardPlacement,
    TablePlan,
)
from embedding.planning.workload import TableLoad


def describe(
    model: CostModel, placement: Mapping[str, Placed], proposer: str, tables_path: str
) -> PlanDescription:
    """The plan of a placement; `tables_path` is where the model holds its `EmbeddingTables`."""
    shape = model.shape
    return PlanDescription(
        world_size=shape.world_size,
        device_type=shape.machine.device,
        ranks_per_host=shape.ranks_per_host,
        topology=shape.name,
        batch_size_per_rank=model.settings.batch_size_per_rank,
        proposer=proposer,
        tables=tuple(
            _table_plan(model.loads[table], placed, shape, tables_path)
            for table, placed in placement.items()
        ),
        unmeasured=tuple(load.name for load in model.loads.values() if not load.measured),
        predicted=predict(model, placement),
    )


def _table_plan(load: TableLoad, placed: Placed, shape: ClusterShape, path: str) -> TablePlan:
    shards = shards_of(load, placed.choice, placed.targets, shape)
    return TablePlan(
        table=load.name,
        module=f"{path}.{load.module}",
        sharding=placed.choice.sharding,
        kernel=placed.choice.kernel,
        cache_load_factor=placed.choice.load_factor,
        shards=tuple(
            ShardPlacement(
                rank=rank,
                row_offset=row,
                column_offset=column,
                num_rows=num_rows,
                num_columns=num_columns,
                weight_bytes=num_rows * num_columns * ELEMENT_BYTES,
            )
            for rank, row, column, num_rows, num_columns in shards
        ),
    )


def placement_of(
    plan: PlanDescription, loads: Sequence[TableLoad], shape: ClusterShape
) -> dict[str, Placed]:
    """The placement that a plan describes, table by table.

    Raises:
        UserError: The plan is for other tables or another number of ranks.
    """
    if plan.world_size != shape.world_size:
        raise UserError(
            f"the plan is for {plan.world_size} ranks and {shape.name} has {shape.world_size}; "
            "plan again: `braid plan` plans for the ranks that the recipe trains on, and with "
            "--topology for any others"
        )
    refuse_other_tables(plan, {load.name for load in loads})
    placement = {}
    for load in loads:
        entry = plan.table(load.name)
        if entry is not None:
            placement[load.name] = _placed(entry, load, shape)
    return placement


def refuse_other_tables(plan: PlanDescription, wanted: set[str]) -> None:
    """Refuse a plan that places tables that are not `wanted`.

    Raises:
        UserError: It names the tables.
    """
    planned = {entry.table for entry in plan.tables}
    if planned - wanted:
        raise UserError(
            f"the plan places {sorted(planned - wanted)}, which the recipe lacks; it has "
            f"{sorted(wanted)}: plan again for this recipe"
        )


def refuse_other_sizes(plan: PlanDescription, schema: FeatureSchema) -> None:
    """Refuse a plan whose tables have other rows or columns; columns are the model's, too.

    Raises:
        UserError: It names the first such table.
    """
    for table in schema.tables:
        entry = plan.table(table.name)
        if entry is None:
            continue
        rows = max(shard.row_offset + shard.num_rows for shard in entry.shards)
        columns = max(shard.column_offset + shard.num_columns for shard in entry.shards)
        if (rows, columns) != (table.num_embeddings, table.embedding_dim):
            raise UserError(
                f"the plan of table {table.name!r} is for {rows} x {columns} elements, and the "
                f"model's table has {table.num_embeddings} x {table.embedding_dim} (a generator "
                "with separate embeddings widens rows); plan again for this recipe"
            )


def _placed(entry: TablePlan, load: TableLoad, shape: ClusterShape) -> Placed:
    columns = {shard.column_offset for shard in entry.shards}
    choice = Choice(entry.sharding, entry.kernel, max(len(columns), 1), entry.cache_load_factor)
    per_host = shape.ranks_per_host
    match choice.domain:
        case "all":
            targets: tuple[int, ...] = (0,)
        case "rank":
            targets = tuple(shard.rank for shard in entry.shards)
        case "host":
            targets = tuple(shard.rank // per_host for shard in entry.shards[::per_host])
    placed = Placed(choice, targets)
    expected = [
        (shard.rank, shard.row_offset, shard.column_offset, shard.num_rows, shard.num_columns)
        for shard in entry.shards
    ]
    if shards_of(load, choice, targets, shape) != expected:
        raise UserError(
            f"the plan of table {load.name!r} does not tile its {load.num_rows} x {load.dim} "
            f"elements over {shape.name} as {entry.sharding} does; plan again for this recipe"
        )
    return placed


def predict(model: CostModel, placement: Mapping[str, Placed]) -> Prediction:
    """Times and bytes of every rank."""
    usage = usage_of(model, dict(placement))
    calls_P = sum((model.group_seconds(key) for key in usage.groups), np.zeros(len(PHASES)))
    phase_P = model.phase_seconds(usage.seconds_PW) + calls_P
    return Prediction(
        constants=model.constants.source,
        step_s=float(phase_P.sum()) + model.fixed_s,
        phase_s=dict(zip(PHASES, map(float, phase_P), strict=True)),
        ranks=tuple(
            RankPrediction(
                bytes=dict(zip(BYTE_KINDS, map(int, bytes_M), strict=True)),
                host_bytes=dict(
                    zip(HOST_BYTE_KINDS, map(int, usage.host_bytes_WH[rank]), strict=True)
                ),
                seconds=dict(
                    zip(PHASES, map(float, usage.seconds_PW[:, rank] + calls_P), strict=True)
                ),
            )
            for rank, bytes_M in enumerate(usage.bytes_WM)
        ),
        binding=binding_sentence(model, placement, usage),
    )


def binding_sentence(model: CostModel, placement: Mapping[str, Placed], usage: Usage) -> str:
    """What stands in the way of a faster step, or of larger tables: one sentence."""
    fullest = int(usage.device_bytes_W.argmax())
    used = usage.device_bytes_W[fullest] / max(model.device_capacity, 1.0)
    seconds_PW = usage.seconds_PW
    phase = int(model.phase_seconds(seconds_PW).argmax())
    slowest = int(seconds_PW[phase].argmax())
    mean = float(seconds_PW[phase].mean())
    if used > 0.9:  # noqa: PLR2004 # a tenth is what a plan may lose to uneven shards
        table = _heaviest(model, placement, fullest, memory=True)
        return (
            f"memory: rank {fullest} uses {used:.0%} of what tables may use, most of it for "
            f"table {table!r}"
        )
    table = _heaviest(model, placement, slowest, memory=False, phase=phase)
    name = PHASES[phase].replace("_", " ")
    if mean and seconds_PW[phase, slowest] > 1.2 * mean:  # noqa: PLR2004 # 20% is worth a word
        return (
            f"imbalance: {name} on rank {slowest} takes {seconds_PW[phase, slowest] / mean:.2f} "
            f"times the mean, most of it for table {table!r}"
        )
    return f"{name} takes the largest part of the step, most of it for table {table!r}"


def _heaviest(
    model: CostModel, placement: Mapping[str, Placed], rank: int, *, memory: bool, phase: int = 0
) -> str:
    def weight(table: str) -> float:
        choice, targets = placement[table]
        priced = model.price(table, choice)
        total = priced.everyone_bytes if memory else float(priced.everyone_s[phase])
        for target in targets:
            owners = model.owners(choice, target)
            if owners.start <= rank < owners.stop:
                total += priced.owner_bytes if memory else float(priced.owner_s[phase])
        return total

    return max(placement, key=weight)
