"""Rows that changed their meaning, carried between all sharding types against a loop over rows."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from embedding.checkpoint import Checkpointer, load_into
from embedding.config import Adagrad, Identity, RowWiseAdagrad, ShardingConfig
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.row_carry import RowCarry, redrawn
from embedding.shard import Sharded
from embedding.warm_start_report import CarriedRows
from tests.distributed import run_distributed
from tests.embedding.toy import SHARDINGS, WholeTable, gather_tables, toy_schema, toy_sharded, train

OPTIMIZERS = (RowWiseAdagrad(), Adagrad())
SIZES = {"genre": 21, "item": 38}
"""Rows after the change; 17 and 41 before."""
UNUSED = 2
"""Rows at the end of a grown table that no code has."""


def carry_of(table: str) -> RowCarry:
    """A third keeps its meaning, a third has a source, a third has none; the OOV row stays."""
    before, after = {"genre": (17, SIZES["genre"] - UNUSED), "item": (41, SIZES["item"])}[table]
    generator = torch.Generator().manual_seed(len(table))
    source = torch.randint(0, before, (after,), generator=generator)
    kind = torch.randint(0, 3, (after,), generator=generator)
    source[kind == 0] = -1
    source[0], kind[0] = 0, 2
    return RowCarry(before, source, (kind == 2) & (source >= 0))


def test_counts_and_blocks() -> None:
    carry = RowCarry(5, torch.tensor([0, 4, -1, 2, 4]), torch.tensor([True, False, False, True, 0]))
    assert carry.counts == CarriedRows(carried=2, sourced=2, redrawn=1)
    found = [
        (p.first_saved, p.num_saved, p.rows.tolist(), p.sources.tolist(), p.carried.tolist())
        for p in carry.pieces(1, 4, rows_per_block=3)
    ]
    # Rows 1 .. 4 of the table are 0 .. 3 of the shard; saved rows come in blocks 0-2, 3-4.
    assert found == [(0, 3, [2], [2], [True]), (3, 2, [0, 3], [1, 1], [False, False])]
    assert redrawn(4).counts == CarriedRows(carried=1, sourced=0, redrawn=3)


def test_tables_of_another_size_are_refused() -> None:
    carry = carry_of("item")
    carry.check("item", 41, 38)
    carry.check("item", 60, 60)
    with pytest.raises(UserError, match="table item: the saved table has 40 rows.* need 41"):
        carry.check("item", 40, 38)
    with pytest.raises(UserError, match="the new table has 37 rows.*window.warm_start=false"):
        carry.check("item", 41, 37)


@pytest.mark.integration
def test_rows_are_carried_into_every_plan(tmp_path: Path) -> None:
    run_distributed(_carry_all, 2, tmp_path)


def _carry_all(directory: Path) -> None:
    for optimizer in OPTIMIZERS:
        kinds = list(SHARDINGS)
        for index, kind in enumerate(kinds):
            saved = _sharded(toy_schema(kind, Identity()), optimizer, seed=7)
            train(saved, range(3), num_ids=15)
            folder = directory / f"{optimizer.kind}-{kind}"
            checkpointer = Checkpointer(folder, keep=1)
            checkpointer.save(3, saved, {})
            checkpointer.close()
            # Into another sharding type, with tables of other sizes.
            schema = _resized(toy_schema(kinds[(index + 2) % len(kinds)], Identity()))
            loaded = _sharded(schema, optimizer, seed=99)
            start = gather_tables(loaded)
            carries = {name: carry_of(name) for name in SIZES}
            report = load_into(folder, loaded, carries)
            assert report.rows == {name: carry.counts for name, carry in carries.items()}
            found, before = gather_tables(loaded), gather_tables(saved)
            for name, carry in carries.items():
                _compare(found[name], before[name], start[name], carry)
            torch.testing.assert_close(found["user"].weight, before["user"].weight, rtol=0, atol=0)
            assert all(torch.tensor(train(loaded, range(3, 4), num_ids=15)).isfinite())


def _compare(found: WholeTable, before: WholeTable, start: WholeTable, carry: RowCarry) -> None:
    expected = start.weight.clone()
    for row, source in enumerate(carry.source_R.tolist()):
        if source >= 0:
            expected[row] = before.weight[source]
    torch.testing.assert_close(found.weight, expected, rtol=0, atol=0)
    for state, pieces in found.states.items():
        for columns, values in pieces.items():
            wanted = start.states[state][columns].clone()
            saved = _saved_state(before.states[state], columns)
            for row, source in enumerate(carry.source_R.tolist()):
                if carry.carried_R[row]:
                    wanted[row] = saved[source]
            torch.testing.assert_close(values, wanted, rtol=1e-6, atol=0)
            assert (saved[carry.source_R[carry.carried_R]] > 0).any(), "nothing to carry"


def _saved_state(pieces: dict[tuple[int, int], Tensor], columns: tuple[int, int]) -> Tensor:
    """State of some columns; a row-wise one of merged column blocks is their weighted mean."""
    if columns in pieces:
        return pieces[columns]
    first, last = columns
    total = torch.zeros_like(next(iter(pieces.values())))
    for (start, stop), values in pieces.items():
        total += values * max(min(last, stop) - max(first, start), 0) / (last - first)
    return total


def _resized(schema: FeatureSchema) -> FeatureSchema:
    tables = tuple(
        t.model_copy(update={"num_embeddings": SIZES.get(t.name, t.num_embeddings)})
        for t in schema.tables
    )
    return schema.model_copy(update={"tables": tables})


def _sharded(schema: FeatureSchema, optimizer, seed: int) -> Sharded:
    grid = any(t.sharding is not None and t.sharding.kind == "grid" for t in schema.tables)
    hosts = ShardingConfig(ranks_per_host=1 if grid else dist.get_world_size())
    return toy_sharded(schema, optimizer, hosts, seed)
