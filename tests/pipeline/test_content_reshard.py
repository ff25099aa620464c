"""A checkpoint of content written by two ranks, loaded by one and by three."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from embedding.checkpoint import Checkpointer
from multimodal.content_encoder import load_content_encoder
from ranking.steps import PlainSteps
from tests.distributed import run_distributed
from tests.embedding.toy import gather_tables
from tests.pipeline.content_steps import (
    announced_batches,
    build_rank,
    recipe,
    write_inputs,
)

pytestmark = pytest.mark.integration

SETTINGS = recipe(cic={"weight": 0.1}, gradient={"items": "targets", "max_items_per_step": None})
NUM_TRAINED = 4


def _save(folder: Path) -> None:
    content, sharded = build_rank(SETTINGS, folder)
    sharded.model.train()
    batches = announced_batches(content, SETTINGS, folder)
    steps = PlainSteps(sharded.model, sharded.optimizer)
    for _ in range(NUM_TRAINED):
        steps.run(batches)
        content.source.learn(1.0)
    Checkpointer(folder / "checkpoint", keep=1).save(NUM_TRAINED, sharded, {}, wait=True)
    beside = content.source.tensors()
    tables = {name: table.weight for name, table in gather_tables(sharded).items()}
    dense = {name: p.detach() for name, p in sharded.dense_parameters.items()}
    if dist.get_rank() == 0:
        torch.save({"beside": beside, "tables": tables, "dense": dense}, folder / "saved.pt")


def _load(folder: Path) -> None:
    content, sharded = build_rank(SETTINGS, folder)
    found = Checkpointer(folder / "checkpoint", keep=1).load_latest(sharded)
    assert found is not None
    assert found[0] == NUM_TRAINED
    saved = torch.load(folder / "saved.pt")
    source = content.source
    # On every rank, not on the first alone: replicas that differ would drift apart.
    bank = {f"bank/{name}": value for name, value in source.bank.state().items()}
    beside = source.placement.state() | source.head.state() | bank
    assert source.step == NUM_TRAINED
    assert beside.keys() == saved["beside"].keys() - {"step"}
    for name, value in beside.items():
        assert value.reshape(-1).equal(saved["beside"][name].reshape(-1)), name
    assert any("content_penalty" in name for name in saved["dense"])
    for name, parameter in sharded.dense_parameters.items():
        assert parameter.detach().equal(saved["dense"][name]), name
    for name, table in gather_tables(sharded).items():
        assert table.weight.equal(saved["tables"][name]), name
    source.refresh()
    if dist.get_rank() == 0:
        torch.save(source.bank.fused_RH, folder / f"vectors-{dist.get_world_size()}.pt")


def test_content_of_two_ranks_goes_on_on_one_and_on_three(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    run_distributed(_save, 2, tmp_path)
    for world_size in (1, 3):
        run_distributed(_load, world_size, tmp_path)

    beside = torch.load(tmp_path / "saved.pt")["beside"]
    assert SETTINGS.content is not None
    start = load_content_encoder(SETTINGS.content).state_dict()
    for part in ("lora_B", "fusion.", "output."):
        moved = [
            not value.equal(start[name.removeprefix("encoder/")])
            for name, value in beside.items()
            if name.startswith("encoder/") and part in name
        ]
        assert moved
        assert all(moved), part
    one, three = (torch.load(tmp_path / f"vectors-{n}.pt") for n in (1, 3))
    torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-6)
