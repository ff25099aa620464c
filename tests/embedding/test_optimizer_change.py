"""Tables that start from those of a run with another sparse optimizer."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from embedding.checkpoint import Checkpointer, load_into
from embedding.config import (
    Adagrad,
    Hashed,
    IdScheme,
    ManagedCollision,
    RowWiseAdagrad,
    Sgd,
    ShardingConfig,
    SparseOptimizer,
)
from embedding.feature_schema import FeatureSchema
from embedding.id_map import by_row, managed_modules
from embedding.shard import Sharded
from tests.distributed import run_distributed
from tests.embedding.toy import WholeTable, gather_tables, toy_schema, toy_sharded, train

pytestmark = pytest.mark.integration

WORLD_SIZE = 2
STILL = 1e-30
"""A learning rate that moves nothing: what is accumulated then depends on the optimizer only."""
TABLES = ("item", "user", "genre", "city")


def test_weights_go_on_under_another_optimizer(tmp_path: Path) -> None:
    run_distributed(_check_all, WORLD_SIZE, tmp_path)


def _check_all(directory: Path) -> None:
    for sharding in ("row_wise", "column_wise", "data_parallel"):
        _check_adagrad_to_row_wise(directory / sharding, sharding)
    managed = ManagedCollision(eviction="lfu", eviction_interval_steps=2)
    _check_adagrad_to_row_wise(directory / "managed", "row_wise", managed)
    _check_moved_rows(directory / "moved", managed)
    _check_weights_only(directory / "weights")


def _still_schema(sharding: str, ids: IdScheme = Hashed(), scale: int = 1) -> FeatureSchema:  # noqa: B008
    schema = toy_schema(sharding, ids, scale)
    still = [table.model_copy(update={"learning_rate": STILL}) for table in schema.tables]
    return schema.model_copy(update={"tables": tuple(still)})


def _built(schema: FeatureSchema, optimizer: SparseOptimizer, seed: int = 7) -> Sharded:
    return toy_sharded(schema, optimizer, ShardingConfig(ranks_per_host=WORLD_SIZE), seed)


def _saved(directory: Path, schema: FeatureSchema, optimizer: SparseOptimizer) -> Sharded:
    sharded = _built(schema, optimizer)
    train(sharded, range(4), 20)
    checkpointer = Checkpointer(directory, keep=1)
    checkpointer.save(4, sharded, {})
    checkpointer.close()
    return sharded


def _check_adagrad_to_row_wise(directory: Path, sharding: str, ids: IdScheme = Hashed()) -> None:  # noqa: B008
    """The state is the one that fbgemm's row-wise kernel would have had from the start."""
    schema = _still_schema(sharding, ids)
    _saved(directory, schema, Adagrad())
    from_start = _built(schema, RowWiseAdagrad())
    train(from_start, range(4), 20)
    expected = gather_tables(from_start)
    changed = _built(schema, RowWiseAdagrad(), seed=8)

    report = load_into(directory, changed)

    assert report.weights_only == ()
    assert {f"tables/{name}" for name in TABLES} <= {*report.carried}
    assert not report.ignored or isinstance(ids, ManagedCollision)
    for name, table in gather_tables(changed).items():
        torch.testing.assert_close(table.weight, expected[name].weight, rtol=0, atol=0)
        assert _state_of(table).keys() == _state_of(expected[name]).keys()
        for span, state in _state_of(table).items():
            assert state.any()
            # a mean of sums against a sum of means, in float32
            torch.testing.assert_close(state, _state_of(expected[name])[span], rtol=1e-5, atol=0)


def _check_moved_rows(directory: Path, managed: ManagedCollision) -> None:
    """Under managed collision a table may grow at the same time, and every id changes its row."""
    before = _saved(directory, _still_schema("row_wise", managed), Adagrad())
    grown = _built(_still_schema("row_wise", managed, scale=2), RowWiseAdagrad(), seed=8)
    load_into(directory, grown)
    for name, module in managed_modules(grown.model).items():
        old, new = gather_tables(before)[name], gather_tables(grown)[name]
        old_rows, new_rows = (_row_of_id(sharded, name) for sharded in (before, grown))
        assert old_rows.keys() == new_rows.keys()
        assert len(new_rows) > 4
        (old_state,), (new_state,) = _state_of(old).values(), _state_of(new).values()
        for raw_id, row in new_rows.items():
            was = old_rows[raw_id]
            assert torch.equal(new.weight[row], old.weight[was])
            torch.testing.assert_close(new_state[row], old_state[was].mean(), rtol=1e-6, atol=0)
        assert new_state.count_nonzero() <= len(new_rows) + WORLD_SIZE  # unknown rows
        assert module.training


def _check_weights_only(directory: Path) -> None:
    schema = toy_schema("row_wise")
    before = _saved(directory, schema, RowWiseAdagrad())
    for optimizer in (Sgd(), Adagrad()):
        changed = _built(schema, optimizer, seed=8)
        report = load_into(directory, changed)
        assert report.weights_only == tuple(f"tables/{name}" for name in TABLES)
        assert {*report.weights_only} <= {*report.carried}
        assert "tables/user/momentum1@0:16" in report.ignored
        for name, table in gather_tables(changed).items():
            assert torch.equal(table.weight, gather_tables(before)[name].weight)
            assert all(not state.any() for state in _state_of(table).values())
        assert {int(shard.step_counter) for shard in changed.shards} == {0}
        assert all(torch.isfinite(torch.tensor(train(changed, range(4, 6)))))


def _state_of(table: WholeTable) -> dict[tuple[int, int], torch.Tensor]:
    return table.states.get("momentum1", {})


def _row_of_id(sharded: Sharded, name: str) -> dict[int, int]:
    """Global row of every id that owns one."""
    module = managed_modules(sharded.model)[name]
    ids = by_row(module)["ids"]
    owned = (ids != torch.iinfo(torch.int64).max).nonzero().squeeze(1).tolist()
    gathered: list = [None] * dist.get_world_size()
    mine = {int(ids[row]): row + module._output_global_offset for row in owned}
    dist.all_gather_object(gathered, mine)
    return {raw_id: row for part in gathered for raw_id, row in part.items()}
