"""Content in the ranker: attention against a loop, and gradients to every vector that is read."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from embedding.batch import RankingBatch
from embedding.items import ItemHistory, ItemIndex, ItemSource
from embedding.loader import SampleFiles, SampleLoader
from ranking import classifier_config as classifiers
from ranking.config import ModelConfig, RankingConfig
from ranking.content import (
    PENALTY,
    ContentPart,
    ContentPenalty,
    ContentShape,
    attend,
)
from ranking.fgcnn_config import Fgcnn
from ranking.model import RankingModel, RankingStep
from ranking.trainer import Trainer, TrainingHooks
from tests.ranking.content_vectors import DIM, STORE, Likeness, StoredVectors
from tests.ranking.small_run import SCHEMA, TASKS, small_config, write_samples

CPU = torch.device("cpu")
SHAPE = ContentShape(DIM, ("past",))


def _attend_by_loop(query: Tensor, keys: Tensor, values: Tensor, history: ItemHistory) -> Tensor:
    rows = []
    for sample, items in enumerate(history.items_N.split(history.lengths_B.tolist())):
        if len(items):
            weights = torch.softmax(torch.stack([query[sample] @ keys[i] for i in items]), dim=0)
            rows.append(sum(w * values[i] for w, i in zip(weights, items, strict=True)))
        else:
            rows.append(torch.zeros(values.shape[1]))
    return torch.stack(rows)


@pytest.mark.parametrize("num_items", [3, 400])  # pairs are few, and many, for the events
def test_attention_equals_a_loop_over_events(num_items: int) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([4, 0, 7, 1, 0])
    items = torch.randint(0, num_items, (12,), generator=generator)
    history = ItemHistory(items, lengths)
    inputs = [
        torch.randn(rows, dim, generator=generator, requires_grad=True)
        for rows, dim in ((5, 4), (num_items, 4), (num_items, DIM))
    ]
    found, expected = attend(*inputs, history), _attend_by_loop(*inputs, history)
    torch.testing.assert_close(found, expected)
    weights = torch.randn(found.shape, generator=generator)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SampleFiles:
    path = tmp_path_factory.mktemp("content") / "part.parquet"
    write_samples(path)
    return _files(path)


def _files(path: Path) -> SampleFiles:
    source = ItemSource(ItemIndex(STORE), {"past": "past_item"})
    return SampleFiles([path], SCHEMA, [task.name for task in TASKS], items=source)


def _first_batch(files: SampleFiles) -> RankingBatch:
    with SampleLoader(files, batch_size_per_rank=32).sequential() as stream:
        return next(iter(stream))


CLASSIFIERS = (
    classifiers.LogisticRegression(),
    classifiers.Fm(),
    classifiers.Ffm(),
    classifiers.Dnn(),
    classifiers.WideDeep(),
    classifiers.DeepFm(),
    classifiers.DcnV2(),
    classifiers.MaskNet(),
    classifiers.FinalMlp(),
    classifiers.Ipnn(),
    classifiers.Opnn(),
    classifiers.Pin(),
    classifiers.Dlrm(),
    classifiers.FiBiNet(),
    classifiers.Ccpm(),
    classifiers.XDeepFm(),
    classifiers.AutoInt(),
)


@pytest.mark.parametrize("classifier", CLASSIFIERS, ids=lambda c: c.kind)
def test_every_classifier_sends_gradient_to_the_content_of_candidates_and_histories(
    files: SampleFiles, classifier: classifiers.Classifier
) -> None:
    config = small_config().model_copy(
        update={"model": small_config().model.model_copy(update={"classifier": classifier})}
    )
    model = RankingModel(SCHEMA, config, tables_device=CPU, content=SHAPE)
    model.tables.initialize(seed=0)
    source = StoredVectors()
    step = RankingStep(model, config, content=ContentPart(source))
    batch = _first_batch(files)
    loss, _ = step(batch)
    loss.backward()
    assert source.last is not None
    assert source.last.vectors_UD.grad is not None
    moved_U = source.last.vectors_UD.grad.abs().sum(dim=1) > 0
    items = source.last.items
    read_U = torch.zeros(len(items.rows_U), dtype=torch.bool)
    read_U[items.candidate_B] = True
    # Not all: a sample's hidden units may all be below zero.
    assert moved_U[read_U].float().mean() > 0.5
    of_histories = items.histories["past"].items_N
    assert moved_U[of_histories].float().mean() > 0.5
    read_U[of_histories] = True
    assert not moved_U[~read_U].any()


def test_content_is_read_behind_a_generator_in_half_precision_too(files: SampleFiles) -> None:
    if not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("no bf16 products")
    model = ModelConfig(
        generator=Fgcnn(maps=(2,), heights=(2,), pools=(1,), new_maps=(1,)),
        classifier=classifiers.DeepFm(hidden=(8,)),
    )
    settings = small_config(precision="bf16")
    config = RankingConfig(tasks=TASKS, model=model, trainer=settings.trainer)
    built = RankingModel(SCHEMA, config, tables_device=CPU, content=SHAPE)
    built.tables.initialize(seed=0)
    source = StoredVectors()
    loss, _ = RankingStep(built, config, content=ContentPart(source))(_first_batch(files))
    loss.backward()
    assert source.last is not None
    assert source.last.vectors_UD.grad is not None
    assert source.last.vectors_UD.grad.dtype == torch.float32


def test_a_model_without_content_has_no_part_for_it(files: SampleFiles) -> None:
    config = small_config()
    plain = RankingModel(SCHEMA, config, tables_device=CPU)
    with_content = RankingModel(SCHEMA, config, tables_device=CPU, content=SHAPE)
    assert not [name for name, _ in plain.named_parameters() if "content" in name]
    assert [name for name, _ in with_content.named_parameters() if "content" in name]
    assert RankingStep(plain, config).content_source is None


def test_the_penalty_sees_candidates_and_their_id_embeddings(files: SampleFiles) -> None:
    config = small_config()
    model = RankingModel(SCHEMA, config, tables_device=CPU, content=SHAPE)
    model.tables.initialize(seed=0)
    source = StoredVectors()
    batch = _first_batch(files)
    part = ContentPart(source, ContentPenalty(Likeness(), "item_id"))
    assert RankingStep(model, config, content=part).get_submodule(PENALTY) is part.penalty
    penalties = [
        RankingStep(model, config, content=content)(batch)[1][-1]
        for content in (ContentPart(source), part)
    ]
    ids_BX = model.tables(batch).field("item_id")
    expected = torch.tensor(0.0)
    for sample, raw_id in enumerate(batch.keys_BK[:, 2].tolist()):
        row = STORE.tolist().index(raw_id) if raw_id in STORE else -1
        if row >= 0:
            expected += row * (source.vectors[row] * ids_BX[sample, :DIM]).sum()
    assert float(penalties[0]) == 0
    torch.testing.assert_close(penalties[1], expected, rtol=1e-3, atol=1e-4)


def test_the_trainer_learns_after_each_step_and_refreshes_before_validation(
    files: SampleFiles,
) -> None:
    config = small_config(epochs=2)
    model = RankingModel(SCHEMA, config, tables_device=CPU, content=SHAPE)
    model.tables.initialize(seed=0)
    source = StoredVectors()
    before = source.vectors.clone()
    step = RankingStep(model, config, content=ContentPart(source))
    trainer = Trainer(
        config.trainer,
        TASKS,
        model=step,
        optimizer=torch.optim.Adam(step.parameters()),
        device=CPU,
        hooks=TrainingHooks(*(lambda *_: None,) * 3),
    )
    loader = SampleLoader(files, batch_size_per_rank=16)
    trainer.fit(loader, validation=loader)
    runs = [(call, len(list(group))) for call, group in itertools.groupby(source.calls)]
    epoch = [("ahead", 1), *[("train", 1), ("learn", 1)] * 19, ("refresh", 1), ("read", 19)]
    assert runs == [*epoch, *epoch, ("refresh", 1)]  # the result holds all vectors
    assert not source.vectors.equal(before)
