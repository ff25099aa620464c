"""Tables of 8 bits against numpy, and against fp32 tables that hold the same values."""

import numpy as np
import pytest
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
from embedding.int8_rows import empty_rows, quantized_rows
from embedding.int8_tables import Int8Tables
from embedding.tables import EmbeddingTables

CPU = torch.device("cpu")
DIMS = (4, 8, 12, 20, 64, 100, 256)
TINY = 1e-8
"""What fbgemm adds to the range of a row before it divides by it."""


def decoded(rows_RW: Tensor) -> np.ndarray:
    """Elements as the format says, without a kernel."""
    data = rows_RW.numpy()
    scale_and_bias = data[:, -8:].copy().view(np.float32)
    return data[:, :-8].astype(np.float32) * scale_and_bias[:, :1] + scale_and_bias[:, 1:]


def awkward_rows(dim: int) -> Tensor:
    """Of all sizes; row 0 is zero, row 1 a constant, row 2 has one element that is not zero."""
    generator = torch.Generator().manual_seed(dim)
    sizes = torch.logspace(-6, 4, 40)[:, None]
    weight = torch.randn(40, dim, generator=generator) * sizes
    weight[:20] += 1.0
    weight[0], weight[1], weight[2] = 0.0, -0.37, 0.0
    weight[2, 1] = 5.0
    return weight


@pytest.mark.parametrize("dim", DIMS)
def test_an_element_is_off_by_half_a_scale_at_most(dim: int) -> None:
    weight = awkward_rows(dim).numpy()

    rows = quantized_rows(torch.from_numpy(weight))

    assert rows.shape == empty_rows(40, dim).shape
    assert rows.dtype == torch.uint8
    scale, bias = rows.numpy()[:, -8:].copy().view(np.float32).T
    low, high = weight.min(axis=1), weight.max(axis=1)
    np.testing.assert_allclose(scale, (high - low) / 255, rtol=1e-6)
    np.testing.assert_array_equal(bias, low)
    error = np.abs(decoded(rows).astype(np.float64) - weight).max(axis=1)
    rounding = np.finfo(np.float32).eps * (255 * scale + np.abs(weight).max(axis=1))
    assert (error <= scale / 2 + rounding + TINY).all(), error / scale


@pytest.mark.parametrize("dim", DIMS)
def test_rows_of_one_value_are_exact(dim: int) -> None:
    weight = awkward_rows(dim)
    assert torch.equal(torch.from_numpy(decoded(quantized_rows(weight)))[:2], weight[:2])


def wide_schema() -> FeatureSchema:
    """Sums and means, tables of two rows, shared tables, two dims of sequences, one of gaps."""
    return FeatureSchema(
        tables=(
            TableConfig(name="item", num_embeddings=40, embedding_dim=8),
            TableConfig(name="shop", num_embeddings=2, embedding_dim=12),
            TableConfig(name="flag", num_embeddings=2, embedding_dim=4),
            TableConfig(name="word", num_embeddings=30, embedding_dim=20),
            TableConfig(name="gap", num_embeddings=5, embedding_dim=8),
        ),
        sparse=(
            SparseFeature(name="words", table="word", pooling="mean"),
            SparseFeature(name="item_id", table="item"),
            SparseFeature(name="flag", table="flag"),
            SparseFeature(name="title", table="word"),
            SparseFeature(name="similar", table="item", pooling="mean"),
            SparseFeature(name="shop_id", table="shop"),
        ),
        histories=(HistoryConfig(name="clicks"),),
        sequences=(
            SequenceFeature(name="past_item", history="clicks", table="item"),
            SequenceFeature(name="past_shop", history="clicks", table="shop"),
            SequenceFeature(name="past_gap", history="clicks", table="gap", source="gap"),
        ),
    )


def random_batch(schema: FeatureSchema, num_rows: int, most_ids: int) -> RankingBatch:
    """Bags of 0 to `most_ids` ids; the sequences of a history have the same lengths."""
    generator = torch.Generator().manual_seed(num_rows)
    history = torch.randint(0, most_ids + 1, (num_rows,), generator=generator)

    def features(names: list[str]) -> KeyedJaggedTensor:
        if not names:
            empty = torch.zeros(0, dtype=torch.int64)
            return KeyedJaggedTensor(keys=[], values=empty, lengths=empty)
        tables = {f.name: schema.table(f.table) for f in schema.id_features}
        histories = {f.name for f in schema.sequences}
        lengths, values = [], []
        for name in names:
            own = torch.randint(0, most_ids + 1, (num_rows,), generator=generator)
            lengths.append(history if name in histories else own)
            size = (int(lengths[-1].sum()),)
            rows = tables[name].num_embeddings
            values.append(torch.randint(0, rows, size, generator=generator))
        return KeyedJaggedTensor(
            keys=names, values=torch.cat(values), lengths=torch.cat(lengths).int()
        )

    nothing = torch.zeros(num_rows, 0)
    return RankingBatch(
        dense_BF=nothing,
        pooled=features([f.name for f in schema.pooled_features]),
        unpooled=features([f.name for f in (*schema.unpooled_features, *schema.sequences)]),
        labels_BT=nothing,
        weights_BT=nothing,
        keys_BK=nothing.long(),
        num_rows=num_rows,
    )


def both(schema: FeatureSchema) -> tuple[Int8Tables, EmbeddingTables]:
    """Tables of 8 bits, and fp32 tables of the values that those stand for."""
    tables = EmbeddingTables(schema, CPU)
    rows = {}
    generator = torch.Generator().manual_seed(1)
    for name, weight in tables.named_parameters():
        table = name.split(".")[-2]
        weight.data = torch.randn(weight.shape, generator=generator)
        weight.data[0] = 0.25
        rows[table] = quantized_rows(weight.data)
        weight.data = torch.from_numpy(decoded(rows[table]))
    return Int8Tables(rows, schema), tables


@pytest.mark.parametrize(("num_rows", "most_ids"), [(50, 4), (1, 1), (7, 0)])
def test_a_lookup_gives_what_fp32_tables_of_the_same_values_give(
    num_rows: int, most_ids: int
) -> None:
    schema = wide_schema()
    int8, fp32 = both(schema)
    batch = random_batch(schema, num_rows, most_ids)

    found, expected = int8(batch), fp32(batch)

    torch.testing.assert_close(found.fields_BD, expected.fields_BD, atol=1e-5, rtol=1e-5)
    assert found.named_dims() == expected.named_dims()
    for part in ("sequences", "lengths", "gap_rows"):
        of_int8, of_fp32 = getattr(found, part), getattr(expected, part)
        assert of_int8.keys() == of_fp32.keys()
        for name, values in of_int8.items():
            torch.testing.assert_close(values, of_fp32[name], atol=1e-6, rtol=1e-6)


def test_tables_may_all_be_pooled_or_all_be_read_by_sequences() -> None:
    schema = wide_schema()
    pooled = schema.model_copy(update={"histories": (), "sequences": ()})
    unpooled = schema.model_copy(
        update={"sparse": tuple(f for f in schema.sparse if f.table in ("item", "shop"))}
    )
    for one_kind in (pooled, unpooled):
        int8, fp32 = both(one_kind)
        batch = random_batch(one_kind, 9, 3)
        torch.testing.assert_close(
            int8(batch).fields_BD, fp32(batch).fields_BD, atol=1e-5, rtol=1e-5
        )


def test_a_row_that_is_not_there_is_an_error() -> None:
    schema = wide_schema()
    int8, _ = both(schema)
    batch = random_batch(schema, 5, 2)
    batch.pooled.values()[-1] = 999

    with pytest.raises(RuntimeError, match="out of bounds"):
        int8(batch)
