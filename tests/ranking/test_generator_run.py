"""FGCNN's widened tables through sharding, checkpoint, plan, bundle, predictor and warm start."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deploy.bundle import write_bundle
from deploy.predictor import Predictor
from embedding.checkpoint import Checkpointer, load_into
from embedding.checkpoint_files import step_directory
from embedding.config import RowWiseAdagrad, ShardingConfig
from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.loader import SampleFiles, SampleLoader
from embedding.planning.plan_description import PlanDescription
from embedding.shard import Sharded
from pipeline.config import DataConfig, PublishConfig, Recipe
from pipeline.gate_config import GateConfig
from ranking.config import RankingConfig
from ranking.fgcnn_config import Fgcnn
from ranking.model import RankingModel, RankingStep
from tests.distributed import run_distributed
from tests.planned import shard_planned
from tests.ranking.small_run import SCHEMA, TASKS, small_config, write_samples

pytestmark = pytest.mark.integration
CPU = torch.device("cpu")


def with_generator(batch_norm: bool = True) -> RankingConfig:
    config = small_config()
    generator = Fgcnn(
        maps=(3,), heights=(3,), pools=(2,), new_maps=(2,), batch_norm=batch_norm, shuffle_seed=1
    )
    return config.model_copy(
        update={"model": config.model.model_copy(update={"generator": generator})}
    )


def two_shardings() -> FeatureSchema:
    """One table split by rows, the other by columns: between the two vectors of a row."""
    data = SCHEMA.model_dump()
    data["tables"][0]["sharding"] = {"kind": "row_wise"}
    data["tables"][1]["sharding"] = {"kind": "column_wise", "num_shards": 2}
    return FeatureSchema.model_validate(data)


def build(config: RankingConfig, plan: PlanDescription | None = None) -> Sharded:
    model = RankingModel(two_shardings(), config, tables_device=torch.device("meta"))
    sharded = shard_planned(
        RankingStep(model, config),
        optimizer=RowWiseAdagrad(),
        sharding=ShardingConfig(),
        dense_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        device=CPU,
        plan=plan,
    )
    sharded.initialize(seed=0)
    return sharded


def train_and_publish(folder: Path) -> None:
    config, rank = with_generator(), dist.get_rank()
    sharded = build(config)
    assert {table.embedding_dim for table in sharded.schema.tables} == {32}
    files = SampleFiles([folder / "part.parquet"], two_shardings(), [t.name for t in TASKS])
    with SampleLoader(
        files, batch_size_per_rank=16, rank=rank, world_size=2
    ).sequential() as stream:
        batches = list(stream)
    sharded.model.train()
    for batch in batches:
        sharded.optimizer.zero_grad()
        loss, _ = sharded.model(batch)
        loss.backward()
        sharded.optimizer.step()
    checkpointer = Checkpointer(folder / "checkpoints", keep=1)
    checkpointer.save(1, sharded, {})
    checkpoint = step_directory(folder / "checkpoints", 1)

    again = build(config)
    checkpointer.load(1, again)
    checkpointer.close()
    # This plain loop leaves every rank the moments of its own rows; the first rank's are saved.
    for step in (sharded, again):
        step.model.eval()
    with torch.no_grad():
        logits_BT = again.model(batches[0])[1][0]
        if rank == 0:
            assert logits_BT.equal(sharded.model(batches[0])[1][0])
        else:
            sharded.model(batches[0])

    plain = build(small_config())
    report = load_into(folder / "checkpoints", plain)
    assert report.initialised["tables/item"] == "embedding_dim changed from 32 to 16"
    with pytest.raises(UserError, match="'user' is for .* x 16 elements.* x 32 .*plan again"):
        build(config, plain.plan)
    if rank == 0:
        recipe = Recipe(
            name="small",
            data=DataConfig(root=folder),
            features=two_shardings(),
            ranking=config,
            gate=GateConfig(task="click"),
        )
        bundle = write_bundle(recipe, checkpoint, folder / "bundle")
        assert {table.embedding_dim for table in bundle.tables.values()} == {32}
        predicted_BT = Predictor(folder / "bundle").predict(batches[0])
        torch.testing.assert_close(predicted_BT, logits_BT.sigmoid(), rtol=1e-6, atol=1e-6)
        in_int8 = recipe.model_copy(update={"publish": PublishConfig(tables="int8")})
        write_bundle(in_int8, checkpoint, folder / "int8")
        of_int8_BT = Predictor(folder / "int8").predict(batches[0])
        assert (of_int8_BT - predicted_BT).abs().max() < predicted_BT.std() / 10


def test_widened_tables_survive_every_stage(tmp_path: Path) -> None:
    write_samples(tmp_path / "part.parquet")
    run_distributed(train_and_publish, 2, tmp_path)
