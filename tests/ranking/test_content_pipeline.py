"""TorchRec's pipeline does not trace into content, and trains on it what the plain loop does."""

from pathlib import Path

import pytest
import torch

from embedding.config import RowWiseAdagrad, ShardingConfig
from embedding.items import ItemIndex, ItemSource
from embedding.loader import SampleFiles, SampleLoader
from ranking.content import ContentPart, ContentPenalty, ContentShape
from ranking.model import RankingModel, RankingStep
from ranking.steps import PipelinedSteps, PlainSteps
from tests.distributed import run_distributed
from tests.planned import shard_planned
from tests.ranking.content_vectors import DIM, STORE, Likeness, StoredVectors
from tests.ranking.small_run import SCHEMA, TASKS, small_config, write_samples

pytestmark = pytest.mark.integration
CPU = torch.device("cpu")


def _check_pipeline(folder: Path) -> None:
    items = ItemSource(ItemIndex(STORE), {"past": "past_item"})
    names = [task.name for task in TASKS]
    files = SampleFiles([folder / "part.parquet"], SCHEMA, names, items=items)
    with SampleLoader(files, batch_size_per_rank=16).sequential() as stream:
        batches = list(stream)[:6]
    found = []
    for pipelined in (False, True):
        source, config = StoredVectors(), small_config()
        model = RankingModel(
            SCHEMA,
            config,
            tables_device=torch.device("meta"),
            content=ContentShape(DIM, ("past",)),
        )
        part = ContentPart(source, ContentPenalty(Likeness(), "item_id"))
        sharded = shard_planned(
            RankingStep(model, config, content=part),
            optimizer=RowWiseAdagrad(),
            sharding=ShardingConfig(),
            dense_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
            device=CPU,
        )
        sharded.initialize(seed=0)
        sharded.model.train()
        steps = (
            PipelinedSteps(sharded.model, sharded.optimizer, CPU)
            if pipelined
            else PlainSteps(sharded.model, sharded.optimizer)
        )
        waiting = iter(batches)
        for _ in batches:
            torch.manual_seed(0)
            steps.run(waiting)
            source.learn(1.0)
        if isinstance(steps, PipelinedSteps):
            assert len(steps._pipeline._pipelined_modules) == 2
        weights = [piece.weight_RD.clone() for piece in sharded.shards]
        weights += [p.detach().clone() for p in sharded.dense_parameters.values()]
        found.append([source.vectors, *weights])
    for plain, piped in zip(*found, strict=True):
        assert plain.equal(piped)


def test_the_pipeline_used_on_gpus_trains_on_content_too(tmp_path: Path) -> None:
    write_samples(tmp_path / "part.parquet")
    run_distributed(_check_pipeline, 1, tmp_path)
