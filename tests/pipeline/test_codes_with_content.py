"""Semantic codes and end-to-end content in one model: both are trained by the ranking loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.codes.columns import code_columns
from pipeline.codes.features import CODES_FILE, ItemCodes
from pipeline.codes.item_vectors import ItemVectors
from pipeline.codes.quantize import quantize
from pipeline.config import Recipe
from ranking.losses import TaskLoss
from ranking.steps import PlainSteps
from tests.distributed import run_distributed
from tests.embedding.toy import gather_tables
from tests.pipeline.content_steps import (
    NUM_ITEMS,
    announced_batches,
    build_rank,
    recipe,
    write_inputs,
)

pytestmark = pytest.mark.integration

NUM_STEPS = 6
CODE_TABLES = ("sid_0", "sid_1", "vq")
CODES = {
    "vectors": {"kind": "column"},
    "rq": {"num_levels": 2, "codebook_size": 4},
    "vq": {"top_k": 2, "max_items": 40},
    "features": {"embedding_dim": 8},
}


def settings() -> Recipe:
    """EM3 with tiny towers, and codes beside it; LoRA starts at exactly 0."""
    plain = recipe(optimizer={"learning_rate": 0.02, "lora_learning_rate": 0.1})
    return Recipe.model_validate({**plain.model_dump(mode="json"), "codes": CODES})


def write_coded(folder: Path) -> None:
    """Samples with codes of the items, and the stored tokens of the items."""
    write_inputs(folder)
    scratch = folder / "day"
    scratch.mkdir()
    vectors_ND = np.random.default_rng(1).standard_normal((NUM_ITEMS, 6)).astype(np.float32)
    items = ItemVectors(np.arange(NUM_ITEMS), vectors_ND, "tower", "2026-01-01", "2026-01-01")
    codes = settings().codes
    assert codes is not None
    quantize(codes, items, folder / "codebooks", scratch)
    samples = pq.read_table(folder / "samples.parquet").combine_chunks()
    events = pa.record_batch(
        {
            "item_id": samples["sparse:item_id"].chunk(0),
            "user_id": samples["sparse:user_id"].chunk(0),
            "history:past:item_id": samples["sequence:past_item"].chunk(0),
        }
    )
    columns = code_columns(settings().features, ItemCodes.load(scratch / CODES_FILE), events)
    for name, column in columns.items():
        samples = samples.append_column(name, column)
    pq.write_table(samples, folder / "samples.parquet")


def train(folder: Path) -> None:
    """On one rank: some steps, and what they moved."""
    content, sharded = build_rank(settings(), folder)
    sharded.model.train()
    found: dict[str, Any] = {"losses": [], "before": state(content, sharded)}
    batches = announced_batches(content, settings(), folder)
    steps, loss = PlainSteps(sharded.model, sharded.optimizer), TaskLoss([1.0])
    for _ in range(NUM_STEPS):
        found["losses"].append(float(loss(*steps.run(batches)[:3])))
        content.source.learn(1.0)
    found["after"] = state(content, sharded)
    content.source.close()
    torch.save(found, folder / "found.pt")


def state(content: Any, sharded: Any) -> dict[str, torch.Tensor]:
    tables = {name: t.weight.clone() for name, t in gather_tables(sharded).items()}
    beside = content.source.tensors()
    encoder = {name: value.clone() for name, value in beside.items() if "lora_" in name}
    return {**tables, **{n: v for n, v in encoder.items() if n.startswith("encoder/")}}


def test_one_step_trains_code_tables_and_lora(tmp_path: Path) -> None:
    write_coded(tmp_path)

    run_distributed(train, 1, tmp_path)

    found = torch.load(tmp_path / "found.pt")
    assert len(found["losses"]) == NUM_STEPS
    assert np.isfinite(found["losses"]).all()
    before, after = found["before"], found["after"]
    assert all(value.isfinite().all() for value in after.values())
    for name in CODE_TABLES:
        moved = int((before[name] != after[name]).any(dim=1).sum())
        assert moved >= 4, f"{moved} rows of {name} moved"
    assert not (before["vq"][31:] != after["vq"][31:]).any(), "rows behind the slots of 30 items"
    lora_b = [name for name in before if "lora_B" in name]
    assert lora_b
    assert {name.split("/")[1].split(".")[1] for name in lora_b} == {"text", "image"}
    for name in lora_b:
        assert not before[name].any(), name
        assert after[name].any(), name
