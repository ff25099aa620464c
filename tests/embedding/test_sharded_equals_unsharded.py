"""For every sharding type and optimizer: same weights and batches, same result as plain PyTorch."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from embedding.config import Adagrad, FeatureSchema, RowWiseAdagrad, Sgd, ShardingConfig
from embedding.initialization import initialize_shard
from tests.distributed import run_distributed
from tests.embedding.toy import (
    SHARDINGS,
    gather_tables,
    loss_of,
    toy_batch,
    toy_schema,
    toy_sharded,
    train,
)

pytestmark = pytest.mark.integration

WORLD_SIZE = 2
NUM_STEPS = 3
TOLERANCE = 1e-5  # float32 sums in another order, over three steps
OPTIMIZERS = (RowWiseAdagrad(), Adagrad(), Sgd())


def test_sharded_equals_unsharded(capfd: pytest.CaptureFixture[str]) -> None:
    run_distributed(_check_all, WORLD_SIZE)
    assert "terminate called" not in capfd.readouterr().err


def _check_all() -> None:
    _check_half_precision_communication()
    for sharding in SHARDINGS:
        for optimizer in OPTIMIZERS:
            _check(sharding, optimizer)


def _check_half_precision_communication() -> None:
    schema = toy_schema("row_wise")
    exact = toy_sharded(schema, Sgd(), ShardingConfig(ranks_per_host=WORLD_SIZE))
    half = toy_sharded(
        schema, Sgd(), ShardingConfig(ranks_per_host=WORLD_SIZE, communication="fp16")
    )
    batch = toy_batch(schema, 3 + dist.get_rank())
    logits, half_logits = exact.model(batch), half.model(batch)
    # float16 keeps 11 bits of about 60 summed products with weights of at most 1
    torch.testing.assert_close(half_logits, logits, rtol=0, atol=60 * 2.0**-11)
    assert not torch.equal(half_logits, logits), "nothing was quantized"
    half_logits.sum().backward()


def _check(sharding: str, optimizer) -> None:
    schema = toy_schema(sharding)
    ranks_per_host = 1 if sharding == "grid" else WORLD_SIZE
    sharded = toy_sharded(schema, optimizer, ShardingConfig(ranks_per_host=ranks_per_host))
    assert {t.sharding for t in sharded.plan.tables} >= {PLAN_NAMES.get(sharding, sharding)}
    spans = {
        table.table: sorted(
            {(s.column_offset, s.column_offset + s.num_columns) for s in table.shards}
        )
        for table in sharded.plan.tables
    }
    reference = Reference(schema, optimizer, spans)
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


class Reference:
    """The toy model in plain PyTorch on the global batch, one process, its own optimizer.

    The loss is the mean over ranks of each rank's loss. Row-wise Adagrad keeps one accumulator per
    row of every column block, as column shards do.
    """

    def __init__(self, schema: FeatureSchema, optimizer, spans: dict[str, list[tuple[int, int]]]):
        self.schema, self.optimizer, self.spans = schema, optimizer, spans
        self.weights = {}
        for table in schema.tables:
            weight = torch.empty(table.num_embeddings, table.embedding_dim)
            initialize_shard(weight, table, seed=7)
            self.weights[table.name] = weight.requires_grad_()
        self.states = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.linear = nn.Linear(56 + 8, 1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, 64).view(1, 64))
            self.linear.bias.zero_()
        self.adam = torch.optim.Adam(self.linear.parameters(), lr=0.01)

    def logits(self, seed: int) -> Tensor:
        batch = toy_batch(self.schema, seed)
        inputs = {**batch.pooled.to_dict(), **batch.unpooled.to_dict()}

        def pool(feature: str, table: str, mode: str = "sum") -> Tensor:
            offsets = inputs[feature].offsets()[:-1].long()
            return nn.functional.embedding_bag(
                inputs[feature].values(), self.weights[table], offsets, mode=mode
            )

        fields = [
            pool("genres", "genre", "mean"),
            pool("item_id", "item"),
            pool("user_id", "user"),
            pool("friend", "user"),
            pool("city", "city"),
            pool("click_items", "item"),
        ]
        return self.linear(torch.cat(fields, dim=1))

    def step(self, seeds: list[int]) -> None:
        self.adam.zero_grad()
        loss = sum(loss_of(self.logits(s), toy_batch(self.schema, s)) for s in seeds) / len(seeds)
        loss.backward()
        self.adam.step()
        for name, weight in self.weights.items():
            lr = self.schema.table(name).learning_rate or self.optimizer.learning_rate
            with torch.no_grad():
                weight -= lr * self._direction(name, weight.grad)
            weight.grad = None

    def _direction(self, name: str, grad: Tensor) -> Tensor:
        match self.optimizer:
            case Sgd():
                return grad
            case Adagrad(eps=eps):
                self.states[name] += grad.square()
                return grad / (self.states[name].sqrt() + eps)
            case RowWiseAdagrad(eps=eps):
                for start, stop in self.spans[name]:
                    block = grad[:, start:stop].square().mean(dim=1, keepdim=True)
                    self.states[name][:, start:stop] += block
                return grad / (self.states[name].sqrt() + eps)
        raise AssertionError(self.optimizer)
