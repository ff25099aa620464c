"""Content and rows of the item table as they were before training, and after it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embedding.config import TableConfig
from embedding.initialization import initialize_shard
from embedding.items import ItemRows
from multimodal.content_encoder import load_content_encoder, trained_state
from multimodal.stored_content import ContentReader
from pipeline.config import Recipe
from pipeline.content import before_and_after
from pipeline.content.paths import ContentPaths
from pipeline.content.training import RankContent
from ranking.steps import PlainSteps
from tests.pipeline.content_steps import (
    NUM_ITEMS,
    announced_batches,
    build_rank,
    one_process,
    recipe,
    write_inputs,
    write_tokens,
)

TABLE = TableConfig(name="item", num_embeddings=50, embedding_dim=8)
ROWS = torch.tensor([49, 0, 7, 7])


def test_start_rows_are_those_of_the_whole_table() -> None:
    whole = torch.empty(50, 8)
    initialize_shard(whole, TABLE, seed=3)
    recipe: Any = SimpleNamespace(ranking=SimpleNamespace(trainer=SimpleNamespace(seed=3)))
    assert torch.equal(before_and_after._start_rows(TABLE, ROWS, recipe), whole[ROWS])


def without_item_id() -> Recipe:
    """A recipe that knows an item by its content alone."""
    settings = recipe(in_history=False).model_dump()
    features = settings["features"]
    features["sparse"] = [f for f in features["sparse"] if f["name"] != "item_id"]
    features["tables"] = [t for t in features["tables"] if t["name"] != "item"]
    features["histories"], features["sequences"] = [], []
    return Recipe.model_validate(settings)


def test_without_a_feature_of_item_ids_content_alone_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokens(tmp_path)
    settings = without_item_id()
    assert settings.content is not None
    built = load_content_encoder(settings.content)
    fused = torch.randn(NUM_ITEMS, built.output.in_features)
    with torch.no_grad():
        trained = built.output(fused)
    bank = {"item_ids": torch.arange(NUM_ITEMS), "fused": fused}
    encoder = trained_state(built)
    saved = {"bank/item_ids": {"": bank["item_ids"]}, "encoder/": encoder}
    monkeypatch.setattr(before_and_after, "read_companion", lambda _, prefix: saved[prefix])
    blocks = [(0, bank["fused"][:3]), (3, bank["fused"][3:])]
    monkeypatch.setattr(before_and_after, "read_companion_rows", lambda *_: iter(blocks))
    paths = ContentPaths(index=tmp_path / "index", stores=tmp_path / "stores")

    item_ids_N, sets = before_and_after.vector_sets(settings, paths, tmp_path)

    assert item_ids_N.tolist() == list(range(NUM_ITEMS))
    assert [s.title for s in sets] == ["content, before training", "content, after training"]
    assert torch.equal(torch.from_numpy(sets[1].vectors_ND), trained)


@pytest.mark.parametrize("fusion", [{"kind": "fq_former"}, {"kind": "concat"}])
def test_content_before_training_is_what_the_first_step_read(
    tmp_path: Path, fusion: dict[str, str]
) -> None:
    write_inputs(tmp_path)
    settings = recipe(fusion=fusion, optimizer={"learning_rate": 0.1})
    assert settings.content is not None
    with one_process():
        content, sharded = build_rank(settings, tmp_path)
        sharded.model.train()
        steps = PlainSteps(sharded.model, sharded.optimizer)
        batches = announced_batches(content, settings, tmp_path)
        content.source.refresh()
        at_step_0 = _vectors(content)
        for _ in range(2):
            steps.run(batches)
            content.source.learn(1.0)
        content.source.refresh()
        saved, now = content.source.tensors(), _vectors(content)
    trained = {n.removeprefix("encoder/"): t for n, t in saved.items() if n.startswith("encoder/")}
    reader = ContentReader(tmp_path / "index", tmp_path / "stores")

    found = before_and_after.start_vectors(
        settings.content, reader, np.arange(NUM_ITEMS)[::2], trained
    )

    torch.testing.assert_close(found, at_step_0[::2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(now, at_step_0, atol=0.01)


def _vectors(content: RankContent) -> Tensor:
    """Of all items, as they are read now."""
    items = ItemRows.of(torch.arange(NUM_ITEMS), {})
    return content.source.read(items).vectors_UD[1:].clone()
