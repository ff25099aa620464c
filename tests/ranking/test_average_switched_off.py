"""A run without `ema_decay` goes on from what its parent published: the average."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from embedding.checkpoint import Checkpointer, load_into
from embedding.config import RowWiseAdagrad, ShardingConfig
from embedding.loader import SampleFiles, SampleLoader
from embedding.shard import Sharded
from ranking.averaging import published_weights, saved_average
from ranking.config import RankingConfig
from ranking.fgcnn_config import Fgcnn
from ranking.model import RankingModel, RankingStep
from tests.distributed import run_distributed
from tests.planned import shard_planned
from tests.ranking.small_run import SCHEMA, TASKS, small_config, write_samples

pytestmark = pytest.mark.integration
CPU = torch.device("cpu")


def build(ema_decay: float | None, seed: int) -> Sharded:
    config = small_config(ema_decay=ema_decay, seed=seed)
    generator = Fgcnn(maps=(3,), heights=(3,), pools=(2,), new_maps=(2,), batch_norm=True)
    model = config.model.model_copy(update={"generator": generator})
    config = RankingConfig.model_validate({**dict(config), "model": model})
    sharded = shard_planned(
        RankingStep(RankingModel(SCHEMA, config, tables_device=torch.device("meta")), config),
        optimizer=RowWiseAdagrad(),
        sharding=ShardingConfig(),
        dense_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        device=CPU,
    )
    sharded.initialize(seed=seed)
    return sharded


def dense_state(sharded: Sharded) -> dict[str, torch.Tensor]:
    """By name in the `RankingStep`."""
    state = sharded.model.module.state_dict()
    return {
        name: tensor.clone() for name, tensor in state.items() if "tables" not in name.split(".")
    }


def train_and_go_on(folder: Path) -> None:
    parent = build(0.9, seed=0)
    files = SampleFiles([folder / "part.parquet"], SCHEMA, [task.name for task in TASKS])
    with SampleLoader(files, batch_size_per_rank=64).sequential() as stream:
        for step, batch in enumerate(stream):
            parent.optimizer.zero_grad()
            parent.model(batch)[0].backward()
            parent.optimizer.step()
            parent.model.module.update_average(step)
    checkpointer = Checkpointer(folder / "checkpoints", keep=1)
    checkpointer.save(1, parent, {})
    checkpointer.close()
    saved = dense_state(parent)
    published = published_weights(saved)
    moved = {name for name, tensor in published.items() if not tensor.equal(saved[name])}
    assert any("running_mean" in name for name in moved)
    assert len(moved) > 10

    without = build(None, seed=1)
    report = load_into(folder / "checkpoints", without, average_of=saved_average)

    found = dense_state(without)
    assert found.keys() == published.keys()
    for name, tensor in published.items():
        assert found[name].equal(tensor), name
    assert moved <= {*report.from_average}
    assert not report.initialised
    assert not report.ignored

    with_average = build(0.5, seed=1)
    report = load_into(folder / "checkpoints", with_average)
    for name, tensor in dense_state(with_average).items():
        assert tensor.equal(saved[name]), name
    assert report.from_average == ()
    dist.barrier()


def test_dense_weights_start_from_the_average_where_none_is_kept_any_more(tmp_path: Path) -> None:
    write_samples(tmp_path / "part.parquet")
    run_distributed(train_and_go_on, 1, tmp_path)
