"""TorchRec's planner and estimator with their defaults: what the plans benchmark compares with."""

import logging
import time

import numpy as np
import torch
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints

from embedding.config import (
    RowWiseAdagrad,
    ShardingConfig,
    SparseOptimizer,
    TableConfig,
)
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.planning.choices import FUSED
from embedding.planning.cluster_shape import ClusterShape, parse_shape
from embedding.planning.demand import StepSettings
from embedding.planning.layout import layout_of
from embedding.planning.plan import describe_plan, torchrec_plan
from embedding.planning.plan_description import PlanDescription
from embedding.planning.plan_timing import TablesStep
from embedding.planning.planner import PlanRequest, plan_tables
from embedding.planning.prediction import placement_of
from embedding.planning.sharders import make_sharders
from embedding.planning.topology import torchrec_topology
from embedding.planning.workload import table_loads
from embedding.shard import declare_optimizer

META = torch.device("meta")


def default_plan(
    schema: FeatureSchema, shape: ClusterShape, batch_size: int, optimizer: SparseOptimizer
) -> PlanDescription:
    """The planner's plan; it is told the features' mean lengths."""
    model = TablesStep(schema)
    declare_optimizer(model.tables, optimizer)
    logging.disable(logging.WARNING)
    try:
        plan = torchrec_plan(
            model,
            make_sharders(ShardingConfig(), shape.machine.device),
            table_loads(schema),
            torchrec_topology(shape),
            batch_size,
        )
    finally:
        logging.disable(logging.NOTSET)
    return describe_plan(plan, schema, shape.world_size, shape.machine.device)


def estimate_plan(
    schema: FeatureSchema,
    plan: PlanDescription,
    shape: ClusterShape,
    batch_size: int,
    optimizer: SparseOptimizer,
) -> float:
    """Seconds of a step by TorchRec's estimator: the busiest rank's sum, its own perf model."""
    model = TablesStep(schema)
    declare_optimizer(model.tables, optimizer)
    enumerator = EmbeddingEnumerator(
        topology=torchrec_topology(shape),
        batch_size=batch_size,
        constraints=_only(plan, schema),
    )
    logging.disable(logging.WARNING)
    options = enumerator.enumerate(model, make_sharders(ShardingConfig(), shape.machine.device))
    logging.disable(logging.NOTSET)
    ms_W = np.zeros(shape.world_size)
    for table in plan.tables:
        option = next(option for option in options if option.name == table.table)
        for shard, placed in zip(option.shards, table.shards, strict=True):
            ms_W[placed.rank] += shard.perf.total
    return float(ms_W.max()) / 1e3


def _only(plan: PlanDescription, schema: FeatureSchema) -> dict[str, ParameterConstraints]:
    """Leaves the enumerator one option a table: the plan's."""
    constraints = {}
    for load in table_loads(schema):
        table = plan.table(load.name)
        assert table is not None
        columns = len({shard.column_offset for shard in table.shards})
        constraints[load.name] = ParameterConstraints(
            sharding_types=[table.sharding],
            compute_kernels=[table.kernel],
            min_partition=load.dim // columns,
            pooling_factors=list(load.ids_per_sample),
        )
    return constraints


def compare_search(
    num_tables: int, topology: str, *, with_theirs: bool
) -> tuple[float, float | None, float | None]:
    """Seconds of our search, of TorchRec's planner, and our plan's cost over theirs."""
    shape = parse_shape(topology)
    schema = skewed_tables(num_tables)
    settings = StepSettings(4096, RowWiseAdagrad())
    request = PlanRequest(schema=schema, shape=shape, settings=settings, kernels=(FUSED,))
    began = time.perf_counter()
    ours = plan_tables(request)
    seconds = time.perf_counter() - began
    if not with_theirs:
        return seconds, None, None
    began = time.perf_counter()
    theirs = default_plan(schema, shape, settings.batch_size_per_rank, settings.optimizer)
    theirs_s = time.perf_counter() - began
    model = request.model()
    placed = placement_of(theirs, list(model.loads.values()), shape)
    assert ours.predicted is not None
    return seconds, theirs_s, ours.predicted.step_s / layout_of(model, placed).cost()


def skewed_tables(num_tables: int, seed: int = 0, largest: float = 8.0) -> FeatureSchema:
    """Rows from a thousand to 10 ** largest, a few of them long lists."""
    rng = np.random.default_rng(seed)
    tables, features = [], []
    for index in range(num_tables):
        rows = int(10 ** rng.uniform(3, largest if num_tables < 200 else largest - 0.5))
        dim = int(rng.choice([16, 32, 64, 128]))
        length = int(rng.choice([1, 1, 1, 5, 20]))
        tables.append(TableConfig(name=f"t{index}", num_embeddings=rows, embedding_dim=dim))
        features.append(SparseFeature(name=f"f{index}", table=f"t{index}", max_length=length))
    return FeatureSchema(tables=tuple(tables), sparse=tuple(features))
