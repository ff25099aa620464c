"""Tables sharded on a GPU against plain PyTorch on the CPU, for every kernel and optimizer."""

from collections import Counter

import pytest
import torch

from embedding.config import (
    Adagrad,
    Adam,
    ManagedCollision,
    RowWiseAdagrad,
    Sgd,
    ShardingConfig,
)
from embedding.feature_schema import FeatureSchema
from embedding.hashing import NO_ID
from embedding.id_map import by_row, managed_modules
from embedding.planning.plan_description import PlanDescription
from embedding.shard import Sharded
from tests.embedding.reference import Reference
from tests.embedding.toy import (
    SHARDINGS,
    gather_tables,
    toy_batch,
    toy_schema,
    toy_sharded,
    train,
)

pytestmark = pytest.mark.gpu

NUM_STEPS = 3
TOLERANCE = 1e-5  # float32 sums in another order, over three steps
OPTIMIZERS = (RowWiseAdagrad(), Adagrad(), Adam(), Sgd())
ONE_HOST = ShardingConfig(ranks_per_host=1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.kind)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_sharded_tables_train_like_plain_ones(group, sharding: str, optimizer) -> None:
    schema = toy_schema(sharding)
    sharded = toy_sharded(schema, optimizer, ONE_HOST, device=group)
    reference = Reference(schema, optimizer, sharded.plan)
    sharded.model.eval()  # what is only evaluated is no step of the optimizer
    torch.testing.assert_close(
        sharded.model(toy_batch(schema, 99).to(group)).cpu(),
        reference.logits(99),
        rtol=TOLERANCE,
        atol=TOLERANCE,
    )

    sharded.model.train()
    train(sharded, range(NUM_STEPS))
    for step in range(NUM_STEPS):
        reference.step([1000 * step])

    for name, table in gather_tables(sharded).items():
        expected = reference.weights[name].detach()
        torch.testing.assert_close(table.weight, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.kind)
@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
def test_tables_in_host_memory_train_like_those_on_the_device(
    group, kernel: str, optimizer
) -> None:
    schema = toy_schema("table_wise", scale=40)
    near = toy_sharded(schema, optimizer, ONE_HOST, device=group)
    plan = _with_kernel(near.plan, kernel)
    far = toy_sharded(schema, optimizer, ONE_HOST, device=group, plan=plan)
    assert {table.kernel for table in far.plan.tables} == {kernel}

    # So many different ids that a cache of a tenth of the rows has to let rows go.
    losses = [train(sharded, range(60), num_ids=5000) for sharded in (near, far)]

    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    expected = gather_tables(near)
    for name, table in gather_tables(far).items():
        torch.testing.assert_close(table.weight, expected[name].weight, rtol=0, atol=TOLERANCE)
        assert table.states.keys() == expected[name].states.keys()
        for state, spans in table.states.items():
            for span, value in spans.items():
                other = expected[name].states[state][span]
                torch.testing.assert_close(value, other, rtol=1e-4, atol=TOLERANCE, msg=state)


def _with_kernel(plan: PlanDescription, kernel: str) -> PlanDescription:
    factor = 0.1 if kernel == "fused_uvm_caching" else None
    changes = {"kernel": kernel, "cache_load_factor": factor}
    tables = tuple(table.model_copy(update=changes) for table in plan.tables)
    return plan.model_copy(update={"tables": tables})


def _managed(group: torch.device, schema: FeatureSchema, optimizer) -> Sharded:
    return toy_sharded(schema, optimizer, ONE_HOST, device=group)


@pytest.mark.parametrize("eviction", ["lfu", "lru", "distance_lfu"])
def test_every_frequent_id_owns_a_row_of_a_managed_table(group, eviction: str) -> None:
    ids = ManagedCollision(eviction=eviction, eviction_interval_steps=2)
    schema = toy_schema("row_wise", ids)
    sharded = _managed(group, schema, RowWiseAdagrad())

    train(sharded, range(6), num_ids=8)

    batches = [toy_batch(schema, 1000 * step, 8) for step in range(6)]
    shown = {
        int(raw_id)
        for batch in batches
        for features in (batch.pooled, batch.unpooled)
        for raw_id in features.values()
    }
    for name, module in managed_modules(sharded.model).items():
        held = by_row(module)["ids"].cpu()
        counts = Counter(held[held != NO_ID].tolist())
        assert counts, f"no id of {name} owns a row"
        assert set(counts.values()) == {1}
        assert set(counts) <= shown


def test_rows_of_evicted_ids_start_anew(group) -> None:
    ids = ManagedCollision(eviction="lru", eviction_interval_steps=4)
    sharded = _managed(group, toy_schema("row_wise", ids), Adam())
    train(sharded, range(7), 500)
    before = {name: by_row(m)["ids"].clone() for name, m in managed_modules(sharded.model).items()}
    # The forward of step 8 evicts; without a backward no state can grow again.
    with torch.no_grad():
        sharded.model(toy_batch(sharded.schema, 8000, 500).to(group))
    num_changed = 0
    for shard in sharded.shards:
        after = by_row(managed_modules(sharded.model)[shard.table.name])["ids"]
        changed = after != before[shard.table.name]
        num_changed += int(changed.sum())
        for state in ("momentum1", "momentum2"):
            assert (shard.states[state][changed] == 0).all()
            assert (shard.states[state][~changed] != 0).any()
    assert num_changed, "nothing was evicted"
