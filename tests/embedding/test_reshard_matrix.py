"""World size 2 -> 1 -> 3, every sharding type to every other, every CPU optimizer, both id schemes.

Three spawns in all; checkpoints and the expected values travel on disk.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from embedding.config import (
    Adagrad,
    ManagedCollision,
    RowWiseAdagrad,
    Sgd,
    ShardingConfig,
)
from embedding.shard import Sharded
from tests.distributed import run_distributed
from tests.embedding.held import NUM_IDS, load_and_compare, save
from tests.embedding.toy import SHARDINGS, toy_schema, toy_sharded, train

pytestmark = pytest.mark.integration

OPTIMIZERS = (RowWiseAdagrad(), Adagrad(), Sgd())
EVICTIONS = ("lfu", "lru", "distance_lfu")


def test_every_plan_and_world_size_loads_every_other(tmp_path: Path) -> None:
    run_distributed(_save_all, 2, tmp_path / "2")
    run_distributed(_load_all, 1, tmp_path / "2", tmp_path / "1")
    run_distributed(_load_all, 3, tmp_path / "1", None)


def _save_all(target: Path) -> None:
    for optimizer in OPTIMIZERS:
        for sharding in SHARDINGS:
            sharded = _sharded(sharding, optimizer, seed=7)
            train(sharded, range(3))
            save(sharded, target / f"{optimizer.kind}-{sharding}")
        for eviction in EVICTIONS:
            sharded = _managed(eviction, optimizer)
            train(sharded, range(5), NUM_IDS)
            save(sharded, target / f"{optimizer.kind}-{eviction}")


def _load_all(source: Path, target: Path | None) -> None:
    kinds = list(SHARDINGS)
    for optimizer in OPTIMIZERS:
        for index, sharding in enumerate(kinds):
            sharded = _sharded(sharding, optimizer, seed=99)
            # SGD has weights alone, which the others carry from every type to every other.
            for saved in (sharding, kinds[index - 1]) if optimizer.kind == "sgd" else kinds:
                load_and_compare(sharded, source / f"{optimizer.kind}-{saved}")
                train(sharded, range(3, 4))
            if target is not None:
                # The next stage compares with what this one holds: again another sharding type.
                saved = source / f"{optimizer.kind}-{kinds[index - 1]}"
                load_and_compare(sharded, saved)
                save(sharded, target / f"{optimizer.kind}-{sharding}")
        for eviction in EVICTIONS:
            sharded = _managed(eviction, optimizer)
            load_and_compare(sharded, source / f"{optimizer.kind}-{eviction}")
            if target is not None:
                save(sharded, target / f"{optimizer.kind}-{eviction}")
            assert all(torch.tensor(train(sharded, range(5, 9), NUM_IDS)).isfinite())


def _sharded(sharding: str, optimizer, seed: int) -> Sharded:
    world_size = dist.get_world_size()
    hosts = ShardingConfig(ranks_per_host=1 if sharding == "grid" else world_size)
    return toy_sharded(toy_schema(sharding), optimizer, hosts, seed)


def _managed(eviction: str, optimizer) -> Sharded:
    ids = ManagedCollision(eviction=eviction, eviction_interval_steps=2)
    hosts = ShardingConfig(ranks_per_host=dist.get_world_size())
    return toy_sharded(toy_schema("row_wise", ids, scale=3), optimizer, hosts)
