"""Rows of the item table before and after training, without the table in memory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedding.config import TableConfig
from embedding.initialization import initialize_shard
from pipeline import content_moments
from pipeline.config import Recipe
from pipeline.content_paths import ContentPaths
from tests.pipeline.content_steps import NUM_ITEMS, recipe, write_tokens

TABLE = TableConfig(name="item", num_embeddings=50, embedding_dim=8)
ROWS = torch.tensor([49, 0, 7, 7])


def test_start_rows_are_those_of_the_whole_table() -> None:
    whole = torch.empty(50, 8)
    initialize_shard(whole, TABLE, seed=3)
    recipe: Any = SimpleNamespace(ranking=SimpleNamespace(trainer=SimpleNamespace(seed=3)))
    assert torch.equal(content_moments._start_rows(TABLE, ROWS, recipe), whole[ROWS])


def test_trained_rows_are_found_in_the_blocks_of_their_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = torch.randn(50, 8)
    blocks = {"user": [(0, torch.zeros(50, 8))], "item": [(0, whole[:20]), (20, whole[20:])]}
    monkeypatch.setattr(content_moments, "read_tables", lambda _: iter(blocks.items()))
    assert torch.equal(content_moments._trained_rows(Path(), "item", ROWS), whole[ROWS])


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
    trained = torch.randn(NUM_ITEMS, 8)
    bank = {"item_ids": torch.arange(NUM_ITEMS), "vectors": trained}
    monkeypatch.setattr(content_moments, "read_companion", lambda *_: bank)
    paths = ContentPaths(index=tmp_path / "index", stores=tmp_path / "stores")

    item_ids_N, sets = content_moments.vector_sets(without_item_id(), paths, tmp_path)

    assert item_ids_N.tolist() == list(range(NUM_ITEMS))
    assert [s.title for s in sets] == ["content, before training", "content, after training"]
    assert torch.equal(torch.from_numpy(sets[1].vectors_ND), trained)
