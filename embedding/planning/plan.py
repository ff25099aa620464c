"""From plain plans to TorchRec's and back; and TorchRec's own planner, to compare with."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec.api import EnumerableShardingSpec
from torch.distributed.remote_device import _remote_device
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.stats import NoopEmbeddingStats
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError, Topology
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    ModuleSharder,
    ParameterSharding,
    ShardingPlan,
    ShardingType,
)

from embedding.config import ColumnWise, Grid, TableColumnWise, TableConfig
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.limits import ELEMENT_BYTES
from embedding.managed_collision import set_num_buckets
from embedding.planning.choices import DEFAULT_LOAD_FACTOR, UVM_CACHING
from embedding.planning.cost import RESERVED_SHARE
from embedding.planning.plan_description import PlanDescription, ShardPlacement, TablePlan
from embedding.planning.workload import TableLoad


def torchrec_plan(
    model: nn.Module,
    sharders: list[ModuleSharder[nn.Module]],
    loads: Sequence[TableLoad],
    topology: Topology,
    batch_size_per_rank: int,
) -> ShardingPlan:
    """Let TorchRec's planner place the tables of `model` (on meta) on `topology`.

    Deterministic for one process, but not between processes (the planner iterates over sets of
    strings): run it on one rank and broadcast the description.

    Raises:
        UserError: if no plan fits; it says what the planner needs and has.
    """
    set_num_buckets(model, topology.world_size)
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size_per_rank,
        constraints={load.name: constraints(load) for load in loads},
        storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED_SHARE),
        stats=[NoopEmbeddingStats()],
        debug=False,
    )
    try:
        return planner.plan(model, sharders)
    except PlannerError as error:
        raise UserError(
            f"no sharding plan fits {topology.world_size} ranks: {error}; use more ranks, smaller "
            "tables, or fewer forced sharding types"
        ) from error


def constraints(load: TableLoad) -> ParameterConstraints:
    """The planner's limits for one table, and the mean lengths of its features."""
    table, pooling = load.table, list(load.ids_per_sample)
    if load.managed:
        return ParameterConstraints(
            sharding_types=[ShardingType.ROW_WISE.value], pooling_factors=pooling
        )
    if table.sharding is None:
        return ParameterConstraints(pooling_factors=pooling)
    kinds = [
        ShardingType.GRID_SHARD.value if table.sharding.kind == "grid" else table.sharding.kind
    ]
    match table.sharding:
        case ColumnWise(num_shards=n) | TableColumnWise(num_shards=n) | Grid(num_column_shards=n):
            return ParameterConstraints(
                sharding_types=kinds,
                min_partition=table.embedding_dim // n,
                pooling_factors=pooling,
            )
        case _:
            return ParameterConstraints(sharding_types=kinds, pooling_factors=pooling)


def describe_plan(
    plan: ShardingPlan, schema: FeatureSchema, world_size: int, device_type: str
) -> PlanDescription:
    """The plan as plain data, tables in the schema's order."""
    tables = []
    for module, entries in plan.plan.items():
        for name, entry in cast(EmbeddingModuleShardingPlan, entries).items():
            tables.append(
                TablePlan(
                    table=name,
                    module=module,
                    sharding=entry.sharding_type,
                    kernel=entry.compute_kernel,
                    cache_load_factor=_load_factor(entry),
                    shards=_placements(entry, schema.table(name), world_size),
                )
            )
    order = [table.name for table in schema.tables]
    tables.sort(key=lambda table: order.index(table.table))
    return PlanDescription(world_size=world_size, device_type=device_type, tables=tuple(tables))


def _load_factor(entry: ParameterSharding) -> float | None:
    if entry.compute_kernel != UVM_CACHING:
        return None
    given = entry.cache_params.load_factor if entry.cache_params else None
    return DEFAULT_LOAD_FACTOR if given is None else given


def plan_of(description: PlanDescription) -> ShardingPlan:
    """The plan that `describe_plan` described."""
    modules: dict[str, EmbeddingModuleShardingPlan] = {}
    for table in description.tables:
        replicated = table.sharding == ShardingType.DATA_PARALLEL.value
        spec = (
            EnumerableShardingSpec(
                [
                    ShardMetadata(
                        shard_offsets=[shard.row_offset, shard.column_offset],
                        shard_sizes=[shard.num_rows, shard.num_columns],
                        placement=_placement(shard.rank, description),
                    )
                    for shard in table.shards
                ]
            )
            if not replicated
            else None
        )
        modules.setdefault(table.module, EmbeddingModuleShardingPlan())[table.table] = (
            ParameterSharding(
                sharding_type=table.sharding,
                compute_kernel=table.kernel,
                ranks=[shard.rank for shard in table.shards],
                sharding_spec=spec,
                cache_params=(
                    CacheParams(load_factor=table.cache_load_factor)
                    if table.cache_load_factor is not None
                    else None
                ),
            )
        )
    return ShardingPlan(plan=dict(modules))


def _placements(
    entry: ParameterSharding, table: TableConfig, world_size: int
) -> tuple[ShardPlacement, ...]:
    if entry.sharding_spec is None:
        whole = (0, 0, table.num_embeddings, table.embedding_dim)
        return tuple(_shard(rank, *whole) for rank in range(world_size))
    spec = cast(EnumerableShardingSpec, entry.sharding_spec)
    return tuple(
        _shard(_rank(shard), *shard.shard_offsets, *shard.shard_sizes) for shard in spec.shards
    )


def _shard(rank: int, row: int, column: int, num_rows: int, num_columns: int) -> ShardPlacement:
    return ShardPlacement(
        rank=rank,
        row_offset=row,
        column_offset=column,
        num_rows=num_rows,
        num_columns=num_columns,
        weight_bytes=num_rows * num_columns * ELEMENT_BYTES,
    )


def _rank(shard: ShardMetadata) -> int:
    rank = cast(_remote_device, shard.placement).rank()
    assert rank is not None
    return rank


def _placement(rank: int, description: PlanDescription) -> str:
    if description.device_type == "cpu":
        return f"rank:{rank}/cpu"
    local_rank = rank % torch.cuda.device_count() if torch.cuda.is_available() else rank
    return f"rank:{rank}/{description.device_type}:{local_rank}"
