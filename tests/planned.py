"""Models sharded over the running process group by a plan made for it, as the plan stage would."""

from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from embedding.config import ShardingConfig, SparseOptimizer
from embedding.planning.demand import step_settings
from embedding.planning.plan_description import PlanDescription
from embedding.planning.planner import PlanRequest, plan_tables
from embedding.planning.this_machine import local_shape
from embedding.shard import DenseOptimizer, Sharded, shard
from embedding.tables import EmbeddingTables


def shard_planned(
    model: nn.Module,
    *,
    optimizer: SparseOptimizer,
    sharding: ShardingConfig,
    dense_optimizer: DenseOptimizer,
    device: torch.device,
    plan: PlanDescription | None = None,
) -> Sharded:
    """Every rank makes the same plan, for the planner draws nothing at random; or `plan` it is."""
    return shard(
        model,
        optimizer=optimizer,
        sharding=sharding,
        dense_optimizer=dense_optimizer,
        device=device,
        plan=plan or plan_here(model, optimizer=optimizer, sharding=sharding, device=device),
    )


def plan_here(
    model: nn.Module, *, optimizer: SparseOptimizer, sharding: ShardingConfig, device: torch.device
) -> PlanDescription:
    """A plan for the running process group."""
    request = PlanRequest(
        schema=cast(EmbeddingTables, model.tables).schema,
        shape=local_shape(sharding, dist.get_world_size(), str(device)),
        settings=step_settings(1024, optimizer, sharding),
        tables_path=next(n for n, m in model.named_modules() if m is model.tables),
        kernels=sharding.kernels,
        calibration=sharding.calibration,
    )
    return plan_tables(request)
