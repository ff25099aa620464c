"""The two views of one lookup, projections, and FGCNN in the whole model."""

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedding.batch import RankingBatch
from embedding.config import TableConfig
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema, SparseFeature
from embedding.tables import EmbeddedBatch
from ranking.classifier_config import Fm
from ranking.compatibility import table_widths
from ranking.config import ModelConfig, RankingConfig, TaskConfig
from ranking.fgcnn_config import Fgcnn
from ranking.fields import FieldGenerator, FieldProjection, FieldViews
from ranking.model import Ranker, RankingModel
from tests.ranking.small_run import SCHEMA, small_config

CPU = torch.device("cpu")
SMALL = Fgcnn(maps=(3,), heights=(3,), pools=(2,), new_maps=(2,))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def schema_of(*dims: int) -> FeatureSchema:
    return FeatureSchema(
        tables=tuple(
            TableConfig(name=f"t{i}", num_embeddings=9, embedding_dim=dim)
            for i, dim in enumerate(dims)
        ),
        sparse=tuple(SparseFeature(name=f"f{i}", table=f"t{i}") for i in range(len(dims))),
    )


@pytest.mark.parametrize("dims", [(8, 8, 8), (8, 4, 16)])
def test_views_split_every_row_into_its_two_vectors(dims: tuple[int, ...]) -> None:
    schema = schema_of(*dims)
    rows = [(torch.randn(5, dim), torch.randn(5, 8)) for dim in dims]
    fields_BX = torch.cat([part for row in rows for part in row], dim=1).requires_grad_()
    embedded = EmbeddedBatch(
        fields_BD=fields_BX,
        field_names=tuple(f.name for f in schema.sparse),
        field_dims=tuple(dim + 8 for dim in dims),
        sequences={},
        lengths={},
    )

    own, generator_BFD = FieldViews(schema, 8)(embedded)

    for index, (classifier_BD, new_BD) in enumerate(rows):
        assert own.field(f"f{index}").equal(classifier_BD)
        assert generator_BFD[:, index].equal(new_BD)
    (own.fields_BD.sum() + 2 * generator_BFD.sum()).backward()
    expected = [value for dim in dims for value in [1.0] * dim + [2.0] * 8]
    assert fields_BX.grad is not None
    assert fields_BX.grad[0].tolist() == expected


def test_tables_hold_both_vectors_and_only_where_fields_read_them() -> None:
    schema = schema_of(8, 4)
    widened = table_widths(schema, ModelConfig(generator=SMALL, field_dim=8))
    assert [table.embedding_dim for table in widened.tables] == [16, 12]
    shared = ModelConfig(generator=Fgcnn(embeddings="shared"), field_dim=8)
    assert table_widths(schema, shared) == schema
    assert table_widths(schema, ModelConfig()) == schema


def test_projection_maps_every_field_by_its_own_matrix() -> None:
    projection = FieldProjection((4, 8, 4, 12), 8)
    fields_BX = torch.randn(3, 28)
    parts = fields_BX.split([4, 8, 4, 12], dim=1)
    from_4, from_12 = projection.weights["from_4"], projection.weights["from_12"]
    expected = [parts[0] @ from_4[0], parts[1], parts[2] @ from_4[1], parts[3] @ from_12[0]]
    torch.testing.assert_close(projection(fields_BX), torch.cat(expected, dim=1))


@pytest.mark.parametrize("embeddings", ["separate", "shared"])
def test_new_features_stand_behind_raw_ones(embeddings: str) -> None:
    settings = SMALL.model_copy(update={"embeddings": embeddings})
    for keep_raw in (True, False):
        config = ModelConfig(generator=settings.model_copy(update={"raw_features": keep_raw}))
        fields = FieldGenerator(schema_of(8, 8, 8), config)
        raw_BX, own_BFD = torch.randn(2, 24), torch.randn(2, 3, 8)
        source = own_BFD if embeddings == "separate" else raw_BX.view(2, 3, 8)
        expected = [raw_BX, *fields.generator(source)] if keep_raw else fields.generator(source)
        given = own_BFD if embeddings == "separate" else None
        out = fields(raw_BX, given)
        assert out.equal(torch.cat(expected, dim=1))
        assert sum(dim for _, dim in fields.output_fields) == out.shape[1]


def _batch(size: int) -> RankingBatch:
    def ids(keys: list[str], per_sample: int) -> KeyedJaggedTensor:
        lengths = torch.full((len(keys) * size,), per_sample)
        return KeyedJaggedTensor(
            keys=keys, values=torch.randint(0, 20, (int(lengths.sum()),)), lengths=lengths
        )

    unpooled = KeyedJaggedTensor(
        keys=["item_id", "past_item"],
        values=torch.randint(0, 20, (4 * size,)),
        lengths=torch.tensor([1] * size + [3] * size),
    )
    return RankingBatch(
        dense_BF=torch.randn(size, 1),
        pooled=ids(["user_id"], 1),
        unpooled=unpooled,
        labels_BT=torch.zeros(size, 2),
        weights_BT=torch.ones(size, 2),
        keys_BK=torch.zeros(size, 4, dtype=torch.int64),
        num_rows=size,
    )


def test_history_reads_the_classifiers_columns_only() -> None:
    config = small_config()
    with_generator = config.model_copy(
        update={"model": config.model.model_copy(update={"generator": SMALL})}
    )
    model = RankingModel(SCHEMA, with_generator, tables_device=CPU)
    model.tables.initialize(0)
    assert {table.embedding_dim for table in model.tables.schema.tables} == {32}
    batch = _batch(6)
    (item_weight,) = [w for n, w in model.tables.named_parameters() if ".item." in n]

    embedded = model.tables(batch)
    own, generator_BFD = model.ranker.fields.split(embedded)
    interest = model.ranker.interests[0](own)
    (grad,) = torch.autograd.grad(interest.sum(), item_weight, retain_graph=True)
    (from_generator,) = torch.autograd.grad(generator_BFD.sum(), item_weight)

    assert own.sequences["past_item"].shape[1] == 16
    assert grad[:, :16].any()
    assert not grad[:, 16:].any()
    # One candidate a sample: histories reach none of the generator's columns.
    assert from_generator[:, 16:].sum().item() == pytest.approx(6 * 16)
    assert not from_generator[:, :16].any()


def test_generator_alone_changes_logits_of_the_same_classifier() -> None:
    config = RankingConfig(
        tasks=(TaskConfig(name="click"),), model=ModelConfig(classifier=Fm(), generator=SMALL)
    )
    ranker = Ranker(schema_of(8, 8), config.model, num_tasks=1, autocast=False)
    embedded = EmbeddedBatch(
        fields_BD=torch.randn(3, 32).requires_grad_(),
        field_names=("f0", "f1"),
        field_dims=(16, 16),
        sequences={},
        lengths={},
    )
    ranker(embedded, torch.zeros(3, 0)).sum().backward()
    assert embedded.fields_BD.grad is not None
    assert embedded.fields_BD.grad.ne(0).all()  # both vectors of every field are trained


def test_unequal_dims_are_refused_by_the_generator() -> None:
    with pytest.raises(UserError, match=r"fgcnn .*embedding_dim=8.*'t2': 4.*field_dim=8"):
        FieldGenerator(schema_of(8, 8, 4), ModelConfig(generator=SMALL))
