"""Bytes of managed collision against the tensors of TorchRec's own module."""

import pytest
import torch
from torchrec.modules.mc_modules import MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from embedding.config import ManagedCollision, RowWiseAdagrad, TableConfig
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.hashing import MANAGED_ID_RANGE
from embedding.id_map import by_row, pending_of
from embedding.managed_collision import _eviction_policy
from embedding.planning.choices import Choice
from embedding.planning.cluster_shape import parse_shape
from embedding.planning.collision_bytes import collision_bytes
from embedding.planning.demand import StepSettings, demand_of
from embedding.planning.plan_description import BYTE_KINDS
from embedding.planning.workload import table_loads
from multimodal.work_meter import WorkMeter

INTERVAL, BATCH = 20, 500
OUTPUT_SEGMENTS = "_output_segments_tensor"
"""A thousand numbers, however many rows there are."""


def run(module: MCHManagedCollisionModule, distinct: int, steps: int) -> None:
    for _ in range(steps):
        ids = torch.randint(0, distinct, (BATCH,))
        module({"f": JaggedTensor(values=ids, lengths=torch.ones(BATCH, dtype=torch.int64))})


def nbytes(tensors) -> int:  # type: ignore[no-untyped-def]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("eviction", ["lfu", "lru", "distance_lfu"])
@pytest.mark.parametrize(("rows", "distinct"), [(100_000, 1 << 60), (100, 1 << 60), (20_000, 200)])
def test_bytes_are_those_of_the_modules_tensors(eviction: str, rows: int, distinct: int) -> None:
    torch.manual_seed(0)
    scheme = ManagedCollision(eviction=eviction, eviction_interval_steps=INTERVAL)
    module = MCHManagedCollisionModule(
        zch_size=rows,
        device=torch.device("cpu"),
        eviction_policy=_eviction_policy(scheme),
        eviction_interval=INTERVAL,
        input_hash_size=MANAGED_ID_RANGE,
    )
    module.train()
    run(module, distinct, 2 * INTERVAL - 1)
    told = collision_bytes(scheme, rows, BATCH, min(distinct, BATCH * INTERVAL))

    history = {f"_history_{name}" for name in module._history_metadata}
    known = {name: b for name, b in module.named_buffers() if name != OUTPUT_SEGMENTS}
    assert history <= set(known)
    held = nbytes(known.values()) + module._history_accumulator.nbytes
    assert told.held == pytest.approx(held, abs=64)

    pending = pending_of(module)
    waiting = nbytes([pending.ids_P, *pending.metadata.values()])
    saved = nbytes(by_row(module).values()) + waiting * INTERVAL / (INTERVAL - 1)
    assert told.saved == pytest.approx(saved, abs=64)

    with WorkMeter() as meter:
        run(module, distinct, 1)
    assert module._last_eviction_iter == module._current_iter
    # The step's own ids are sorted by their rows as well, which counts as input.
    step = 10 * 8 * BATCH
    assert 0.75 * meter.peak_bytes - step <= told.eviction <= 1.25 * meter.peak_bytes + step


def test_a_rank_holds_the_map_of_its_rows_and_the_ids_it_receives() -> None:
    """4 ranks of 25 rows; each receives a quarter of 4 x 10 x 3 uniform ids, and keeps 5 steps."""
    scheme = ManagedCollision(eviction_interval_steps=5)
    tables = [
        TableConfig(name="t", num_embeddings=100, embedding_dim=16, ids=ids)
        for ids in (scheme, {"kind": "hashed"})
    ]
    managed, plain = (
        demand_of(
            table_loads(
                FeatureSchema(
                    tables=(table,), sparse=(SparseFeature(name="f", table="t", max_length=3),)
                ),
                exponent=0.0,
            )[0],
            Choice("row_wise", "fused"),
            parse_shape("cpu:4"),
            StepSettings(10, RowWiseAdagrad(), copies_for_checkpoints=True),
        )
        for table in tables
    )
    more = dict(zip(BYTE_KINDS, managed.owner_bytes - plain.owner_bytes, strict=True))
    # The owner of the hottest of a hundred equal rows gets it and a quarter of the rest.
    received = 4 * 10 * 3 * (0.01 + 0.99 / 4)
    distinct = 100 * (1 - 0.99**600) / 4
    told = collision_bytes(scheme, 25, received, distinct)
    assert more.pop("managed") == pytest.approx(told.held + told.eviction)
    assert more.pop("copy") == pytest.approx(told.saved)
    assert not any(more.values())
