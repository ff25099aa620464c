"""Unsharded lookups against plain indexing into the weights."""

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedding.batch import RankingBatch
from embedding.config import TableConfig
from embedding.feature_schema import (
    FeatureSchema,
    HistoryConfig,
    SequenceFeature,
    SparseFeature,
)
from embedding.tables import EmbeddingTables

CPU = torch.device("cpu")
SCHEMA = FeatureSchema(
    tables=(
        TableConfig(name="item", num_embeddings=50, embedding_dim=8),
        TableConfig(name="user", num_embeddings=40, embedding_dim=4),
        TableConfig(name="genre", num_embeddings=10, embedding_dim=8),
    ),
    sparse=(
        SparseFeature(name="genres", table="genre", pooling="mean"),
        SparseFeature(name="item_id", table="item"),
        SparseFeature(name="user_id", table="user"),
        SparseFeature(name="similar", table="item", pooling="mean"),
        SparseFeature(name="friend", table="user"),
    ),
    histories=(HistoryConfig(name="clicks", max_length=5),),
    sequences=(SequenceFeature(name="click_items", history="clicks", table="item"),),
)


def kjt(values: dict[str, list[list[int]]]) -> KeyedJaggedTensor:
    flat = [row for rows in values.values() for row in rows]
    return KeyedJaggedTensor(
        keys=list(values),
        values=torch.tensor([v for row in flat for v in row], dtype=torch.int64),
        lengths=torch.tensor([len(row) for row in flat], dtype=torch.int32),
    )


def batch_of(
    pooled: dict[str, list[list[int]]], unpooled: dict[str, list[list[int]]]
) -> RankingBatch:
    num_rows = len(next(iter(pooled.values())))
    return RankingBatch(
        dense_BF=torch.zeros(num_rows, 0),
        pooled=kjt(pooled),
        unpooled=kjt(unpooled),
        labels_BT=torch.zeros(num_rows, 1),
        weights_BT=torch.ones(num_rows, 1),
        keys_BK=torch.zeros(num_rows, 4, dtype=torch.int64),
        num_rows=num_rows,
    )


POOLED = {
    "genres": [[1, 2], [], [3]],
    "user_id": [[5], [6], [7]],
    "friend": [[8], [9], [1]],
}
UNPOOLED = {
    "item_id": [[4], [5], [6]],
    "similar": [[1, 2, 3], [], [9]],
    "click_items": [[1, 2], [], [3]],
}


def pool(weight: Tensor, rows: list[list[int]], mean: bool) -> Tensor:
    sums = [sum((weight[r] for r in row), torch.zeros(weight.shape[1])) for row in rows]
    return torch.stack([s / max(1, len(r)) if mean else s for s, r in zip(sums, rows, strict=True)])


def test_fields_are_pooled_rows_in_schema_order() -> None:
    tables = EmbeddingTables(SCHEMA, CPU)
    tables.initialize(seed=1)
    weights = {name.split(".")[-2]: w.detach() for name, w in tables.named_parameters()}

    embedded = tables(batch_of(POOLED, UNPOOLED))

    expected = {
        "genres": pool(weights["genre"], POOLED["genres"], mean=True),
        "item_id": pool(weights["item"], UNPOOLED["item_id"], mean=False),
        "user_id": pool(weights["user"], POOLED["user_id"], mean=False),
        "similar": pool(weights["item"], UNPOOLED["similar"], mean=True),
        "friend": pool(weights["user"], POOLED["friend"], mean=False),
    }
    assert embedded.field_names == tuple(expected)
    torch.testing.assert_close(embedded.fields_BD, torch.cat(list(expected.values()), dim=1))
    torch.testing.assert_close(embedded.field("similar"), expected["similar"])
    torch.testing.assert_close(
        embedded.sequences["click_items"], weights["item"][torch.tensor([1, 2, 3])]
    )
    assert embedded.lengths["clicks"].tolist() == [2, 0, 1]


def test_gradient_reaches_every_looked_up_row() -> None:
    tables = EmbeddingTables(SCHEMA, CPU)
    tables.initialize(seed=1)
    embedded = tables(batch_of(POOLED, UNPOOLED))
    (embedded.fields_BD.sum() + embedded.sequences["click_items"].sum()).backward()
    grads = {name.split(".")[-2]: w.grad for name, w in tables.named_parameters()}
    touched = {name: set(torch.where(g.abs().sum(1) > 0)[0].tolist()) for name, g in grads.items()}
    assert touched == {
        "item": {1, 2, 3, 4, 5, 6, 9},
        "user": {1, 5, 6, 7, 8, 9},
        "genre": {1, 2, 3},
    }
