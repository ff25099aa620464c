"""Shards of every choice against TorchRec's own cutting."""

from dataclasses import replace

import pytest
import torch
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets

from embedding.config import (
    Grid,
    ManagedCollision,
    RowWise,
    Sharding,
    TableConfig,
    TableRowWise,
)
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.planning.choices import Choice, choices_of, shards_of
from embedding.planning.cluster_shape import ClusterShape, find_machine
from embedding.planning.workload import TableLoad, collection_names, table_loads
from tests.embedding.toy import SHARDINGS, ToyModel, toy_schema

SHAPE = ClusterShape(machine=find_machine("h100"), num_hosts=2, ranks_per_host=4)


def load_of(rows: int, dim: int) -> TableLoad:
    table = TableConfig(name="t", num_embeddings=rows, embedding_dim=dim)
    schema = FeatureSchema(tables=(table,), sparse=(SparseFeature(name="f", table="t"),))
    return table_loads(schema)[0]


@pytest.mark.parametrize("rows", [8, 10, 101, 64_000])
def test_shards_are_cut_as_torchrec_cuts_them(rows: int) -> None:
    load = load_of(rows, 64)
    for choice in choices_of(load, SHAPE, ("fused",)):
        targets = tuple(range(choice.num_units))
        targets = (
            tuple(t % SHAPE.num_hosts for t in targets) if choice.domain == "host" else targets
        )
        shards = shards_of(load, choice, targets, SHAPE)
        sizes, offsets = calculate_shard_sizes_and_offsets(
            torch.empty(rows, 64, device="meta"),
            SHAPE.world_size,
            SHAPE.ranks_per_host,
            choice.sharding,
            64 // choice.column_shards,
        )
        assert [[n, d] for _, _, _, n, d in shards] == sizes
        assert [[row, column] for _, row, column, _, _ in shards] == offsets


def test_no_choice_leaves_a_rank_with_an_empty_shard() -> None:
    assert "row_wise" not in {c.sharding for c in choices_of(load_of(5, 16), SHAPE)}
    assert "row_wise" in {c.sharding for c in choices_of(load_of(16, 16), SHAPE)}


@pytest.mark.parametrize(
    ("sharding", "rows", "blocks"),
    [
        (RowWise(), 9, "8 blocks of 2"),
        (TableRowWise(), 2, "4 blocks of 1"),
        (Grid(), 5, "4 blocks"),
    ],
)
def test_a_forced_sharding_that_leaves_a_rank_without_rows_is_refused(
    sharding: Sharding, rows: int, blocks: str
) -> None:
    load = load_of(rows, 16)
    forced = replace(load, table=load.table.model_copy(update={"sharding": sharding}))
    with pytest.raises(UserError, match=f"its {rows} rows into {blocks}.*use table_wise"):
        choices_of(forced, SHAPE)
    enough = forced.table.model_copy(update={"num_embeddings": 16})
    assert choices_of(replace(forced, table=enough), SHAPE)


@pytest.mark.parametrize(
    ("rows", "blocks", "enough"),
    [(9, "8 blocks of 2", 16), (5, "8 blocks of 1", 16), (17, "8 blocks of 3", 24)],
)
def test_managed_collision_that_leaves_a_rank_without_rows_is_refused(
    rows: int, blocks: str, enough: int
) -> None:
    load = load_of(rows, 16)
    managed = replace(load, table=load.table.model_copy(update={"ids": ManagedCollision()}))
    with pytest.raises(UserError, match=f"its {rows} rows into {blocks}.*num_embeddings={enough},"):
        choices_of(managed, SHAPE)
    larger = managed.table.model_copy(update={"num_embeddings": enough})
    assert {c.sharding for c in choices_of(replace(managed, table=larger), SHAPE)} == {"row_wise"}


def test_cpu_has_fused_and_dense_kernels_only() -> None:
    cpu = ClusterShape(machine=find_machine("cpu"), ranks_per_host=2)
    assert {c.kernel for c in choices_of(load_of(100, 64), cpu)} == {"fused", "dense"}


def test_a_forced_hierarchical_sequence_table_is_refused() -> None:
    schema = toy_schema("row_wise")
    item = schema.table("item").model_copy(update={"sharding": TableRowWise()})
    schema = schema.model_copy(update={"tables": (item, *schema.tables[1:])})
    with pytest.raises(UserError, match="pooled tables only"):
        choices_of(table_loads(schema)[0], SHAPE)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_collections_have_the_paths_of_the_model(sharding: str) -> None:
    schema = toy_schema(sharding)
    model = ToyModel(schema, torch.device("meta"))
    names = collection_names(schema)
    found = {
        name.split(".")[-2]: path
        for path, module in model.tables.named_modules()
        if type(module).__name__ in ("EmbeddingBagCollection", "EmbeddingCollection")
        for name, _ in module.named_parameters()
    }
    assert names == found


def test_a_choice_reads_as_a_person_would_write_it() -> None:
    assert str(Choice("column_wise", "fused_uvm_caching", 4, 0.2)) == (
        "column_wise x4 fused_uvm_caching 20%"
    )
