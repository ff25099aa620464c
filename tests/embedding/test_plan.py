"""Plans and refusals; plans for GPUs are made without any."""

import pytest
import torch

from embedding.config import (
    Adagrad,
    Adam,
    ManagedCollision,
    RowWiseAdagrad,
    ShardingConfig,
    TableConfig,
    TableRowWise,
    TableWise,
)
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.limits import check_optimizer, check_support
from embedding.planning.cluster_shape import ClusterShape, find_machine
from embedding.planning.machines import GIB
from embedding.planning.plan import describe_plan, plan_of, torchrec_plan
from embedding.planning.plan_description import PlanDescription
from embedding.planning.sharders import make_sharders
from embedding.planning.this_machine import ranks_per_host
from embedding.planning.topology import torchrec_topology
from embedding.planning.workload import table_loads
from tests.embedding.toy import SHARDINGS, ToyModel, toy_schema

META = torch.device("meta")


def plan_for(schema: FeatureSchema, device_type: str, num_gib: float = 16) -> PlanDescription:
    machine = find_machine("cpu" if device_type == "cpu" else "h100").model_copy(
        update={
            "hbm_bytes": 0 if device_type == "cpu" else int(num_gib * GIB),
            "host_bytes": 2 * int(num_gib * GIB) if device_type == "cpu" else 128 * GIB,
        }
    )
    topology = torchrec_topology(ClusterShape(machine=machine, num_hosts=2, ranks_per_host=2))
    sharders = make_sharders(ShardingConfig(), device_type)
    plan = torchrec_plan(ToyModel(schema, META), sharders, table_loads(schema), topology, 64)
    return describe_plan(plan, schema, 4, device_type)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_forced_sharding_is_planned_and_survives_json(sharding: str, device_type: str) -> None:
    schema = toy_schema(sharding)
    plan = plan_for(schema, device_type)

    expected = "grid_shard" if sharding == "grid" else sharding
    assert {t.sharding for t in plan.tables if t.table != "item"} == {expected}
    again = PlanDescription.model_validate_json(plan.model_dump_json())
    assert describe_plan(plan_of(again), schema, 4, device_type) == plan
    for table in plan.tables:
        config = schema.table(table.table)
        copies = 4 if table.sharding == "data_parallel" else 1
        whole_bytes = config.num_embeddings * config.embedding_dim * 4
        assert sum(shard.weight_bytes for shard in table.shards) == copies * whole_bytes
    assert sum(plan.weight_bytes_per_rank()) == sum(
        shard.weight_bytes for table in plan.tables for shard in table.shards
    )


def test_managed_tables_are_planned_row_wise_on_any_number_of_ranks() -> None:
    plan = plan_for(toy_schema("row_wise", ManagedCollision()), "cpu")
    assert {table.sharding for table in plan.tables} == {"row_wise"}


def test_too_little_memory_is_an_error_with_figures() -> None:
    with pytest.raises(UserError, match="no sharding plan fits 4 ranks"):
        plan_for(toy_schema("table_wise", scale=10_000), "cpu", num_gib=0.001)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"ids": ManagedCollision(), "sharding": TableWise()}, "row_wise sharding only"),
        ({"sharding": SHARDINGS["column_wise"], "embedding_dim": 4}, "column shards"),
    ],
)
def test_impossible_sharding_is_refused(table: dict, message: str) -> None:
    config = TableConfig(name="t", num_embeddings=9, **table)
    schema = FeatureSchema(tables=(config,), sparse=(SparseFeature(name="f", table="t"),))
    with pytest.raises(UserError, match=message):
        check_support(schema, Adagrad(), ShardingConfig(), "cpu")


def test_hierarchical_sharding_of_a_sequence_table_is_refused() -> None:
    schema = toy_schema("row_wise")
    item = schema.table("item").model_copy(update={"sharding": TableRowWise()})
    schema = schema.model_copy(update={"tables": (item, *schema.tables[1:])})
    with pytest.raises(UserError, match="tables.item.sharding: table_row_wise works for pooled"):
        check_support(schema, Adagrad(), ShardingConfig(), "cpu")


@pytest.mark.parametrize("optimizer", [Adam(), RowWiseAdagrad(weight_decay=0.1)])
def test_what_cpu_kernels_lack_is_refused(optimizer) -> None:
    with pytest.raises(UserError):
        check_optimizer(optimizer, "cpu")


def test_what_cuda_kernels_have_is_accepted() -> None:
    check_optimizer(Adam(weight_decay=0.1), "cuda")
    check_optimizer(RowWiseAdagrad(weight_decay=0.1), "cuda")


def test_bf16_communication_is_refused_on_cpu_only() -> None:
    schema, sharding = toy_schema("row_wise"), ShardingConfig(communication="bf16")
    check_support(schema, Adagrad(), sharding, "cuda")
    with pytest.raises(UserError, match="bf16"):
        check_support(schema, Adagrad(), sharding, "cpu")


def test_kernels_for_host_memory_alone_are_refused_on_cpu_only() -> None:
    schema, sharding = toy_schema("row_wise"), ShardingConfig(kernels=("fused_uvm",))
    check_support(schema, Adagrad(), sharding, "cuda")
    with pytest.raises(UserError, match=r"kernels: \['fused_uvm'\].* the only kernel is fused"):
        check_support(schema, Adagrad(), sharding, "cpu")


def test_ranks_per_host_must_divide_the_world_size() -> None:
    assert ranks_per_host(ShardingConfig(ranks_per_host=2), 4) == 2
    with pytest.raises(UserError, match="does not divide"):
        ranks_per_host(ShardingConfig(ranks_per_host=3), 4)
