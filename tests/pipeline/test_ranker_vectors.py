"""ID vectors of a ranker's table against the table that was saved."""

from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from embedding import stored
from embedding.checkpoint import Checkpointer
from embedding.config import (
    Hashed,
    Identity,
    IdScheme,
    ManagedCollision,
    RowWiseAdagrad,
)
from embedding.hashing import rows_of
from embedding.id_map import by_row, managed_modules
from embedding.shard import Sharded
from pipeline.codes.ranker_vectors import RankerItems, ranker_vectors
from tests.distributed import run_distributed
from tests.embedding.toy import gather_tables, toy_schema, toy_sharded, train

pytestmark = pytest.mark.integration

NUM_IDS, NUM_LATER = 60, 5
LAST_DAY = date(2024, 1, 9)


def test_vectors_are_the_rows_that_the_ranker_trained(tmp_path: Path) -> None:
    first_days = [LAST_DAY - timedelta(days=i % 9) for i in range(NUM_IDS)]
    first_days += [LAST_DAY + timedelta(days=1)] * NUM_LATER
    ids = np.arange(NUM_IDS + NUM_LATER)
    table = pa.table({"item_id": ids, "first_day": first_days})
    pq.write_table(table.take(ids[::-1]), tmp_path / "counts.parquet")
    run_distributed(_check, 2, tmp_path)


def _check(folder: Path) -> None:
    stored.BLOCK_BYTES = 7 * 8 * 4  # the table is read seven rows at a time
    for ids in (Hashed(), Identity(), ManagedCollision(eviction_interval_steps=2)):
        _check_scheme(folder, ids)


def _check_scheme(folder: Path, ids: IdScheme) -> None:
    sharded = toy_sharded(toy_schema("row_wise", ids), RowWiseAdagrad())
    train(sharded, range(6), NUM_IDS)
    Checkpointer(folder / ids.kind, keep=1).save(6, sharded, {}, wait=True)
    weight_RD = gather_tables(sharded)["item"].weight.numpy()
    item = sharded.schema.table("item")
    counts = folder / "counts.parquet"
    ranker = RankerItems(folder / ids.kind, item, counts, LAST_DAY.isoformat())

    found = ranker_vectors(ranker)

    assert found is not None
    expected = _rows_of_items(sharded)
    assert 10 < len(expected) <= NUM_IDS
    assert found.sorted_ids_N.tolist() == sorted(expected)
    for item_id, row in expected.items():
        unit = weight_RD[row] / np.linalg.norm(weight_RD[row])
        (at,) = found.rows_of(np.array([item_id]))
        np.testing.assert_allclose(found.unit_RD[at], unit, rtol=1e-5)
    places = found.rows_of(np.array(list(expected)))
    assert len(np.unique(places)) == len({*expected.values()}), "one vector a row"
    later = np.arange(NUM_IDS, NUM_IDS + NUM_LATER)
    assert (found.rows_of(later) == -1).all()

    elsewhere = item.model_copy(update={"name": "elsewhere"})
    assert ranker_vectors(replace(ranker, table=elsewhere)) is None
    changed = item.model_copy(update={"ids": Hashed() if ids.kind == "identity" else Identity()})
    assert ranker_vectors(replace(ranker, table=changed)) is None


def _rows_of_items(sharded: Sharded) -> dict[int, int]:
    """Row of every item that has one of its own, or shares it with other known items."""
    item = sharded.schema.table("item")
    mixed = rows_of(torch.arange(NUM_IDS), item).tolist()
    match item.ids:
        case Hashed():
            assert len({*mixed}) < NUM_IDS, "there are fewer rows than items"
            return dict(enumerate(mixed))
        case Identity():
            return {item_id: item_id + 1 for item_id in range(item.num_embeddings - 1)}
        case _:
            owners = _owners(sharded)
            return {i: owners[name] for i, name in enumerate(mixed) if name in owners}


def _owners(sharded: Sharded) -> dict[int, int]:
    """Row by id, as the collision modules of all ranks have it."""
    module = managed_modules(sharded.model)["item"]
    first = module._output_global_offset
    own = {name: first + row for row, name in enumerate(by_row(module)["ids"].tolist())}
    gathered: list[dict[int, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    return {name: row for part in gathered for name, row in part.items()}
