"""Checkpoints between GPUs and CPUs: exact, and without a second copy of a table on the device."""

from pathlib import Path

import pytest
import torch

from embedding.checkpoint import Checkpointer
from embedding.config import (
    Adam,
    ManagedCollision,
    RowWiseAdagrad,
    ShardingConfig,
    TableConfig,
)
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.planning.plan_timing import TablesStep
from tests.embedding.held import NUM_IDS, load_and_compare, save
from tests.embedding.toy import CPU, toy_schema, toy_sharded, train
from tests.planned import shard_planned

pytestmark = pytest.mark.gpu

ONE_HOST = ShardingConfig(ranks_per_host=1)
SHARDINGS = ("data_parallel", "row_wise", "column_wise", "grid")
MIB = 1 << 20


def test_every_sharding_type_loads_every_other_with_adam(group, tmp_path: Path) -> None:
    for sharding in SHARDINGS:
        saved = toy_sharded(toy_schema(sharding), Adam(), ONE_HOST, device=group)
        train(saved, range(3))
        save(saved, tmp_path / sharding)
    for sharding in SHARDINGS:
        loaded = toy_sharded(toy_schema(sharding), Adam(), ONE_HOST, seed=99, device=group)
        for other in SHARDINGS:
            load_and_compare(loaded, tmp_path / other)
            train(loaded, range(3, 4))


@pytest.mark.parametrize("to_gpu", [False, True])
def test_a_training_moves_between_cpu_and_gpu(group, tmp_path: Path, to_gpu: bool) -> None:
    devices = (CPU, group) if to_gpu else (group, CPU)
    for ids in (None, ManagedCollision(eviction="lfu", eviction_interval_steps=2)):
        schema = toy_schema("row_wise", scale=3) if ids is None else toy_schema("row_wise", ids, 3)
        first, second = (
            toy_sharded(schema, RowWiseAdagrad(), ONE_HOST, seed, device=device)
            for seed, device in enumerate(devices)
        )
        train(first, range(5), NUM_IDS)
        directory = tmp_path / ("plain" if ids is None else "managed")
        save(first, directory)
        load_and_compare(second, directory)
        if ids is None:
            losses = [train(sharded, range(5, 9), NUM_IDS) for sharded in (first, second)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_saving_and_loading_hold_no_second_copy_on_the_device(group, tmp_path: Path) -> None:
    schema = FeatureSchema(
        tables=(TableConfig(name="big", num_embeddings=1_000_000, embedding_dim=64),),
        sparse=(SparseFeature(name="f", table="big"),),
    )
    sharded = shard_planned(
        TablesStep(schema),
        optimizer=Adam(),
        sharding=ONE_HOST,
        dense_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        device=group,
    )
    sharded.initialize(seed=1)
    table_bytes = 4 * 1_000_000 * 64
    (piece,) = sharded.shards
    assert piece.weight_RD.is_cuda
    expected = piece.weight_RD.cpu()
    checkpointer = Checkpointer(tmp_path, keep=1)
    for wait in (True, False):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        checkpointer.save(1, sharded, {}, wait=wait)
        checkpointer.wait()
        piece.weight_RD.zero_()
        checkpointer.load(1, sharded)
        assert torch.cuda.max_memory_allocated() - before < table_bytes / 3
        assert piece.weight_RD.cpu().equal(expected)
    checkpointer.close()
