"""For every sharding type and optimizer: same weights and batches, same result as plain PyTorch."""

import pytest
import torch
import torch.distributed as dist

from embedding.config import Adagrad, RowWiseAdagrad, Sgd, ShardingConfig
from tests.distributed import run_distributed
from tests.embedding.reference import Reference
from tests.embedding.toy import SHARDINGS, gather_tables, toy_batch, toy_schema, toy_sharded, train

pytestmark = pytest.mark.integration

WORLD_SIZE = 2
NUM_STEPS = 3
TOLERANCE = 1e-5  # float32 sums in another order, over three steps
OPTIMIZERS = (RowWiseAdagrad(), Adagrad(), Sgd())


def test_sharded_equals_unsharded(capfd: pytest.CaptureFixture[str]) -> None:
    run_distributed(_check_all, WORLD_SIZE, fresh=True)
    assert "terminate called" not in capfd.readouterr().err


def _check_all() -> None:
    _check_half_precision_communication()
    for sharding in SHARDINGS:
        for optimizer in OPTIMIZERS:
            _check(sharding, optimizer)


def _check_half_precision_communication() -> None:
    schema = toy_schema("row_wise")
    exact, half = (
        toy_sharded(
            schema,
            RowWiseAdagrad(),
            ShardingConfig(ranks_per_host=WORLD_SIZE, communication=communication),
        )
        for communication in ("fp32", "fp16")
    )
    batch = toy_batch(schema, 3 + dist.get_rank())
    logits, half_logits = exact.model(batch), half.model(batch)
    # float16 keeps 11 bits of about 60 summed products with weights of at most 1
    torch.testing.assert_close(half_logits, logits, rtol=0, atol=60 * 2.0**-11)
    assert not torch.equal(half_logits, logits), "nothing was quantized"
    # Gradients as small as those of a large batch's mean, squared in the accumulators.
    for outcome in (logits, half_logits):
        (1e-9 * outcome.sum()).backward()
    held, expected = gather_tables(half), gather_tables(exact)
    for name, table in expected.items():
        for span, state in table.states["momentum1"].items():
            assert state.any(), f"nothing of {name} was updated"
            torch.testing.assert_close(
                held[name].states["momentum1"][span], state, rtol=TOLERANCE, atol=0
            )


def _check(sharding: str, optimizer) -> None:
    schema = toy_schema(sharding)
    ranks_per_host = 1 if sharding == "grid" else WORLD_SIZE
    sharded = toy_sharded(schema, optimizer, ShardingConfig(ranks_per_host=ranks_per_host))
    assert {t.sharding for t in sharded.plan.tables} >= {PLAN_NAMES.get(sharding, sharding)}
    reference = Reference(schema, optimizer, sharded.plan)
    rank = dist.get_rank()
    batch = toy_batch(schema, 99 + rank)
    torch.testing.assert_close(
        sharded.model(batch), reference.logits(99 + rank), rtol=TOLERANCE, atol=TOLERANCE
    )

    train(sharded, range(NUM_STEPS))
    for step in range(NUM_STEPS):
        reference.step([1000 * step + r for r in range(WORLD_SIZE)])

    for name, table in gather_tables(sharded).items():
        message = f"{sharding} {optimizer.kind} table {name}"
        torch.testing.assert_close(
            table.weight,
            reference.weights[name].detach(),
            rtol=0,
            atol=TOLERANCE,
            msg=message,
        )
    torch.testing.assert_close(
        next(p for n, p in sharded.dense_parameters.items() if n.endswith("linear.weight")),
        reference.linear.weight,
        rtol=0,
        atol=TOLERANCE,
    )


PLAN_NAMES = {"grid": "grid_shard"}
