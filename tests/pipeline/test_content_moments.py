"""Rows of the item table before and after training, without the table in memory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedding.config import TableConfig
from embedding.initialization import initialize_shard
from pipeline import content_moments

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
