"""World size 2 -> 1 -> 3, every sharding type to every other, every CPU optimizer, both id schemes.

Three spawns in all; checkpoints and the expected values travel on disk.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from embedding.checkpoint import Checkpointer
from embedding.config import Adagrad, ManagedCollision, RowWiseAdagrad, Sgd, ShardingConfig
from embedding.id_map import NO_ID, by_row, managed_modules
from embedding.shard import Sharded
from tests.distributed import run_distributed
from tests.embedding.toy import (
    SHARDINGS,
    WholeTable,
    gather_tables,
    toy_batch,
    toy_schema,
    toy_sharded,
    train,
)

pytestmark = pytest.mark.integration

OPTIMIZERS = (RowWiseAdagrad(), Adagrad(), Sgd())
EVICTIONS = ("lfu", "lru", "distance_lfu")
NUM_IDS = 8  # few enough that every id owns a row
STATE_TOLERANCE = 1e-6  # a mean of float32 accumulators, summed in another order


def test_every_plan_and_world_size_loads_every_other(tmp_path: Path) -> None:
    run_distributed(_save_all, 2, tmp_path / "2")
    run_distributed(_load_all, 1, tmp_path / "2", tmp_path / "1")
    run_distributed(_load_all, 3, tmp_path / "1", None)


def _save_all(target: Path) -> None:
    for optimizer in OPTIMIZERS:
        for sharding in SHARDINGS:
            sharded = _sharded(sharding, optimizer, seed=7)
            train(sharded, range(3))
            _save(sharded, target / f"{optimizer.kind}-{sharding}")
        for eviction in EVICTIONS:
            sharded = _managed(eviction, optimizer)
            train(sharded, range(5), NUM_IDS)
            _save(sharded, target / f"{optimizer.kind}-{eviction}")


def _load_all(source: Path, target: Path | None) -> None:
    kinds = list(SHARDINGS)
    for optimizer in OPTIMIZERS:
        for index, sharding in enumerate(kinds):
            sharded = _sharded(sharding, optimizer, seed=99)
            for saved in kinds:
                _load_and_compare(sharded, source / f"{optimizer.kind}-{saved}")
                train(sharded, range(3, 4))
            if target is not None:
                # The next stage compares with what this one holds: again another sharding type.
                saved = source / f"{optimizer.kind}-{kinds[index - 1]}"
                _load_and_compare(sharded, saved)
                _save(sharded, target / f"{optimizer.kind}-{sharding}")
        for eviction in EVICTIONS:
            sharded = _managed(eviction, optimizer)
            _load_and_compare(sharded, source / f"{optimizer.kind}-{eviction}")
            if target is not None:
                _save(sharded, target / f"{optimizer.kind}-{eviction}")
            assert all(torch.tensor(train(sharded, range(5, 9), NUM_IDS)).isfinite())


def _sharded(sharding: str, optimizer, seed: int) -> Sharded:
    world_size = dist.get_world_size()
    hosts = ShardingConfig(ranks_per_host=1 if sharding == "grid" else world_size)
    return toy_sharded(toy_schema(sharding), optimizer, hosts, seed)


def _managed(eviction: str, optimizer) -> Sharded:
    ids = ManagedCollision(eviction=eviction, eviction_interval_steps=2)
    hosts = ShardingConfig(ranks_per_host=dist.get_world_size())
    return toy_sharded(toy_schema("row_wise", ids, scale=3), optimizer, hosts)


def _save(sharded: Sharded, directory: Path) -> None:
    checkpointer = Checkpointer(directory, keep=1)
    checkpointer.save(3, sharded, {})
    checkpointer.close()
    held = _held(sharded)
    if dist.get_rank() == 0:
        torch.save(held, directory / "held.pt")
    dist.barrier()


def _load_and_compare(sharded: Sharded, directory: Path) -> None:
    checkpointer = Checkpointer(directory, keep=1)
    checkpointer.load(3, sharded)
    checkpointer.close()
    expected, held = torch.load(directory / "held.pt", weights_only=False), _held(sharded)
    place = f"{directory.name} -> {[t.sharding for t in sharded.plan.tables]}"
    for name, table in held["tables"].items():
        _compare_table(table, expected["tables"][name], f"{place}: {name}")
    for name, rows in held["ids"].items():
        assert rows.keys() == expected["ids"][name].keys(), f"{place}: ids of {name}"
        assert rows, f"{place}: no id of {name} owns a row"
        for raw_id, values in rows.items():
            torch.testing.assert_close(values, expected["ids"][name][raw_id], rtol=0, atol=0)
    for key in ("dense", "dense_states"):
        torch.testing.assert_close(held[key], expected[key], rtol=0, atol=0)
    if held["ids"]:
        torch.testing.assert_close(held["logits"], expected["logits"], rtol=1e-5, atol=1e-6)


def _held(sharded: Sharded) -> dict:
    """Everything a checkpoint must carry, gathered from all ranks into plain objects."""
    tables = gather_tables(sharded)
    ids = {
        name: _rows_by_id(sharded, name, tables[name]) for name in managed_modules(sharded.model)
    }
    sharded.model.eval()
    with torch.no_grad():
        logits = sharded.model(toy_batch(sharded.schema, 5, NUM_IDS))
    sharded.model.train()
    state = sharded.dense_optimizer.state
    return {
        # Managed tables change their row numbers; they are compared by id.
        "tables": {name: table for name, table in tables.items() if name not in ids},
        "ids": ids,
        "logits": logits,
        "dense": {n: p.detach().clone() for n, p in sharded.dense_parameters.items()},
        "dense_states": {
            n: {k: v.clone() for k, v in state[p].items()}
            for n, p in sharded.dense_parameters.items()
            if p in state
        },
    }


def _rows_by_id(sharded: Sharded, name: str, table: WholeTable) -> dict[int, dict[str, Tensor]]:
    module = managed_modules(sharded.model)[name]
    local = (module._output_global_offset, {k: v.clone() for k, v in by_row(module).items()})
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    rows = {}
    for offset, state in gathered:
        for row, raw_id in enumerate(state["ids"].tolist()):
            if raw_id != NO_ID:
                states = {
                    key: value[offset + row]
                    for key, spans in table.states.items()
                    for value in spans.values()
                }
                metadata = {key: value[row] for key, value in state.items() if key != "ids"}
                rows[raw_id] = {"weight": table.weight[offset + row], **states, **metadata}
    return rows


def _compare_table(held: WholeTable, expected: WholeTable, place: str) -> None:
    torch.testing.assert_close(held.weight, expected.weight, rtol=0, atol=0, msg=place)
    assert held.states.keys() == expected.states.keys(), place
    for name, spans in held.states.items():
        # Spread every accumulator over its columns; a merged one is then the mean of its columns.
        spread = torch.full_like(expected.weight, torch.nan)
        for (start, stop), value in expected.states[name].items():
            spread[:, start:stop] = value if value.dim() == 2 else value[:, None]
        for (start, stop), value in spans.items():
            target = spread[:, start:stop]
            target = target if value.dim() == 2 else target.mean(dim=1)
            torch.testing.assert_close(value, target, rtol=STATE_TOLERANCE, atol=0, msg=place)
