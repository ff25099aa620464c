"""A small model on every kind of table, batches for it, and ways to look into its shards."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedding.batch import RankingBatch
from embedding.config import (
    ColumnWise,
    DataParallel,
    Grid,
    Hashed,
    IdScheme,
    RowWise,
    Sharding,
    ShardingConfig,
    SparseOptimizer,
    TableColumnWise,
    TableConfig,
    TableRowWise,
    TableWise,
)
from embedding.feature_schema import (
    FeatureSchema,
    HistoryConfig,
    SequenceFeature,
    SparseFeature,
)
from embedding.hashing import rows_of
from embedding.placement import flush_caches
from embedding.planning.plan_description import PlanDescription
from embedding.shard import Sharded
from embedding.tables import EmbeddingTables
from tests.planned import shard_planned

CPU = torch.device("cpu")
BATCH_SIZE = 6

SHARDINGS: dict[str, Sharding] = {
    "data_parallel": DataParallel(),
    "table_wise": TableWise(),
    "row_wise": RowWise(),
    "column_wise": ColumnWise(num_shards=2),
    "table_row_wise": TableRowWise(),
    "table_column_wise": TableColumnWise(num_shards=2),
    "grid": Grid(num_column_shards=2),
}
SEQUENCE_SHARDINGS = ("data_parallel", "table_wise", "row_wise", "column_wise")


def toy_schema(sharding: str, ids: IdScheme = Hashed(), scale: int = 1) -> FeatureSchema:  # noqa: B008
    """Five features on three pooled tables, two on a sequence table, all of one sharding type."""
    pooled = SHARDINGS[sharding]
    sequence = SHARDINGS[sharding if sharding in SEQUENCE_SHARDINGS else "row_wise"]
    return FeatureSchema(
        tables=(
            TableConfig(
                name="item", num_embeddings=41 * scale, embedding_dim=8, sharding=sequence, ids=ids
            ),
            TableConfig(
                name="user",
                num_embeddings=30 * scale,
                embedding_dim=16,
                sharding=pooled,
                ids=ids,
                learning_rate=0.05,
            ),
            TableConfig(
                name="genre", num_embeddings=17 * scale, embedding_dim=8, sharding=pooled, ids=ids
            ),
            TableConfig(
                name="city", num_embeddings=23 * scale, embedding_dim=8, sharding=pooled, ids=ids
            ),
        ),
        sparse=(
            SparseFeature(name="genres", table="genre", pooling="mean"),
            SparseFeature(name="item_id", table="item"),
            SparseFeature(name="user_id", table="user"),
            SparseFeature(name="friend", table="user"),
            SparseFeature(name="city", table="city"),
        ),
        histories=(HistoryConfig(name="clicks", max_length=5),),
        sequences=(SequenceFeature(name="click_items", history="clicks", table="item"),),
    )


class ToyModel(nn.Module):
    """Tables, and a linear layer on the fields and on the sum of each sample's history."""

    def __init__(self, schema: FeatureSchema, device: torch.device) -> None:
        super().__init__()
        self.tables = EmbeddingTables(schema, device)
        self.linear = nn.Linear(sum(self.tables.assembly.field_dims) + 8, 1)
        with torch.no_grad():
            weights = torch.linspace(-1, 1, self.linear.weight.numel())
            self.linear.weight.copy_(weights.view_as(self.linear.weight))
            self.linear.bias.zero_()

    def forward(self, batch: RankingBatch) -> Tensor:
        """Logits (B, 1)."""
        embedded = self.tables(batch)
        history_BD = torch.segment_reduce(
            embedded.sequences["click_items"],
            "sum",
            lengths=embedded.lengths["clicks"].long(),
            axis=0,
            unsafe=True,
            initial=0.0,
        )
        return self.linear(torch.cat([embedded.fields_BD, history_BD], dim=1))


def loss_of(logits: Tensor, batch: RankingBatch) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels_BT, reduction="sum")


def toy_batch(schema: FeatureSchema, seed: int, num_ids: int = 200) -> RankingBatch:
    """Random raw ids through the schema's id schemes, ready for the tables."""
    generator = torch.Generator().manual_seed(seed)

    def random(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    def kjt(features: dict[str, tuple[str, bool]]) -> KeyedJaggedTensor:
        lengths = {
            name: random(0, 4, BATCH_SIZE) if many else torch.ones(BATCH_SIZE, dtype=torch.int64)
            for name, (_, many) in features.items()
        }
        values = [
            rows_of(random(-1, num_ids, int(lengths[name].sum())), schema.table(table))
            for name, (table, _) in features.items()
        ]
        return KeyedJaggedTensor(
            keys=list(features),
            values=torch.cat(values),
            lengths=torch.cat(list(lengths.values())).int(),
        )

    return RankingBatch(
        dense_BF=torch.zeros(BATCH_SIZE, 0),
        pooled=kjt(
            {
                "genres": ("genre", True),
                "user_id": ("user", False),
                "friend": ("user", False),
                "city": ("city", False),
            }
        ),
        unpooled=kjt({"item_id": ("item", False), "click_items": ("item", True)}),
        labels_BT=random(0, 2, BATCH_SIZE).float().unsqueeze(1),
        weights_BT=torch.ones(BATCH_SIZE, 1),
        keys_BK=torch.zeros(BATCH_SIZE, 4, dtype=torch.int64),
        num_rows=BATCH_SIZE,
    )


def toy_sharded(
    schema: FeatureSchema,
    optimizer: SparseOptimizer,
    sharding: ShardingConfig | None = None,
    seed: int | None = 7,
    model: type[ToyModel] = ToyModel,
    device: torch.device = CPU,
    plan: PlanDescription | None = None,
) -> Sharded:
    """The toy model sharded over the running process group, with start values of `seed`."""
    torch.manual_seed(0)
    sharded = shard_planned(
        model(schema, torch.device("meta")),
        optimizer=optimizer,
        sharding=sharding or ShardingConfig(),
        dense_optimizer=lambda params: torch.optim.Adam(params, lr=0.01, fused=True),
        device=device,
        plan=plan,
    )
    if seed is not None:
        sharded.initialize(seed)
    return sharded


def device_of(sharded: Sharded) -> torch.device:
    return next(iter(sharded.dense_parameters.values())).device


def train(sharded: Sharded, steps: range, num_ids: int = 200) -> list[float]:
    """Train on batches that depend on step and rank only; the losses of this rank."""
    losses = []
    for step in steps:
        batch = toy_batch(sharded.schema, 1000 * step + dist.get_rank(), num_ids)
        batch = batch.to(device_of(sharded))
        sharded.optimizer.zero_grad()
        loss = loss_of(sharded.model(batch), batch)
        loss.backward()
        sharded.optimizer.step()
        losses.append(float(loss))
    return losses


@dataclass
class WholeTable:
    """One table gathered from all ranks."""

    weight: Tensor
    states: dict[str, dict[tuple[int, int], Tensor]]
    """By state and column range: a row-wise state exists once per column shard."""


def gather_tables(sharded: Sharded) -> dict[str, WholeTable]:
    """Every table on every rank, assembled from all shards; checks that they tile it."""
    flush_caches(sharded.shards, forget=False)
    local = [
        (
            s.table.name,
            s.rows,
            s.columns,
            s.weight_RD.to("cpu", copy=True),
            {k: v.to("cpu", copy=True) for k, v in s.states.items()},
        )
        for s in sharded.shards
    ]
    gathered: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, local)
    tables: dict[str, WholeTable] = {}
    for table in sharded.schema.tables:
        shape = (table.num_embeddings, table.embedding_dim)
        whole = WholeTable(torch.full(shape, torch.nan), {})
        for name, (row, row_end), (column, column_end), weight, states in sum(gathered, []):
            if name != table.name:
                continue
            whole.weight[row:row_end, column:column_end] = weight
            for key, value in states.items():
                pieces = whole.states.setdefault(key, {})
                if value.dim() == 2:
                    state = pieces.setdefault((0, shape[1]), torch.full(shape, torch.nan))
                    state[row:row_end, column:column_end] = value
                else:
                    span = (column, column_end)
                    state = pieces.setdefault(span, torch.full(shape[:1], torch.nan))
                    state[row:row_end] = value
        assert not whole.weight.isnan().any(), f"the shards of {name} do not cover it"
        tables[table.name] = whole
    return tables
