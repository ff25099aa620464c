"""A model with content, trained on a small catalogue in one process, and its bundle."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from deploy.bundle import write_bundle
from embedding.checkpoint import Checkpointer
from embedding.checkpoint_files import step_directory
from pipeline.config import Recipe
from pipeline.content import reading, stage
from ranking.steps import PlainSteps
from tests.one_process import encode_here
from tests.pipeline.content_steps import (
    NUM_ITEMS,
    announced_batches,
    build_rank,
    recipe,
    write_samples,
)
from tests.pipeline.small_log import run_here

ITEMS_PER_BATCH = 8
NUM_STEPS = 6
TEXT_LESS, PICTURE_LESS, EMPTY = 3, 4, 5
"""Items of the catalogue that lack one modality, or both."""

Row = dict[str, Any]


def catalogue_rows() -> list[Row]:
    rows = [item_row(i) for i in range(NUM_ITEMS)]
    rows[TEXT_LESS]["text"] = rows[EMPTY]["text"] = None
    rows[PICTURE_LESS]["image"] = rows[EMPTY]["image"] = None
    return rows


def item_row(item_id: int, like: int | None = None) -> Row:
    """An item with text and image of its own, or with those of another."""
    seed = item_id if like is None else like
    text = f"item number {seed} is " + "very " * (seed % 7) + "good"
    return {"item_id": item_id, "text": text, "image": picture(seed)}


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_catalogue(path: Path, rows: list[Row], **options: Any) -> None:
    schema = pa.schema([("item_id", pa.int64()), ("text", pa.string()), ("image", pa.binary())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, **options)


def settings() -> Recipe:
    """Rates at which six steps move LoRA by much more than a tolerance."""
    return recipe(
        optimizer={"learning_rate": 0.02, "lora_learning_rate": 0.1},
        tokens={"items_per_batch": ITEMS_PER_BATCH},
    )


def train_and_publish(folder: Path) -> None:
    """On one rank of a process group: content stage, some steps, checkpoint, `bundle/`."""
    write_catalogue(folder / "items.parquet", catalogue_rows())
    write_samples(folder / "samples.parquet")
    config = settings()
    _store_tokens(config, folder)
    content, sharded = build_rank(config, folder)
    sharded.model.train()
    steps = PlainSteps(sharded.model, sharded.optimizer)
    batches = announced_batches(content, config, folder)
    for _ in range(NUM_STEPS):
        steps.run(batches)
        content.source.learn(1.0)
    content.source.refresh()
    checkpointer = Checkpointer(folder / "checkpoints", keep=1)
    checkpointer.save(1, sharded, {})
    checkpointer.close()
    content.source.close()
    checkpoint = step_directory(folder / "checkpoints", 1)
    write_bundle(config, checkpoint, folder / "bundle")
    torch.save(content.source.tensors(), folder / "trained.pt")


def _store_tokens(config: Recipe, folder: Path) -> None:
    """The content stage, without Ray."""
    assert config.content is not None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "stream_tasks", run_here)
        patch.setattr(stage, "stream_tasks", run_here)
        patch.setattr(stage, "encode_on_workers", encode_here)
        (folder / "index").mkdir()
        checked = reading.check_content(config.content, folder)
        stage.content((checked, reading.read_digests(checked)), folder / "stores", folder / "index")
