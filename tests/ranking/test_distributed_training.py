"""Training on process groups: TorchRec's pipeline, and two ranks that must agree."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from embedding.config import RowWiseAdagrad, ShardingConfig
from embedding.loader import SampleFiles, SampleLoader
from embedding.shard import Sharded, shard
from ranking.model import RankingModel, RankingStep
from ranking.trainer import Trainer, TrainingHooks
from tests.ranking.small_run import NUM_ROWS, SCHEMA, TASKS, small_config, write_samples

CPU = torch.device("cpu")

pytestmark = pytest.mark.integration


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _join(rank: int, world_size: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=world_size)


def _sharded() -> Sharded:
    config = small_config()
    model = RankingModel(SCHEMA, config, tables_device=torch.device("meta"))
    sharded = shard(
        RankingStep(model, config),
        optimizer=RowWiseAdagrad(),
        sharding=ShardingConfig(),
        dense_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        device=CPU,
    )
    sharded.initialize(seed=0)
    sharded.model.train()
    return sharded


def _state(sharded: Sharded) -> list[torch.Tensor]:
    tables = [piece.weight_RD.clone() for piece in sharded.shards]
    return tables + [p.detach().clone() for p in sharded.dense_parameters.values()]


def _spawned_pipeline(_: int, port: int, folder: str) -> None:
    _join(0, 1, port)
    files = SampleFiles([Path(folder) / "part.parquet"], SCHEMA, [task.name for task in TASKS])
    with SampleLoader(files, batch_size_per_rank=16).sequential() as stream:
        batches = list(stream)[:6]
    plain, piped = _sharded(), _sharded()
    for batch in batches:
        torch.manual_seed(0)
        plain.optimizer.zero_grad()
        loss, _ = plain.model(batch)
        loss.backward()
        plain.optimizer.step()
    pipeline = TrainPipelineSparseDist(piped.model, piped.optimizer, CPU)
    source = iter(batches)
    for _ in batches:
        torch.manual_seed(0)
        pipeline.progress(source)
    # Both collections were found by tracing, so their input dist overlaps; nothing was skipped.
    assert len(pipeline._pipelined_modules) == 2
    for ours, theirs in zip(_state(plain), _state(piped), strict=True):
        assert ours.equal(theirs)
    dist.destroy_process_group()


def test_the_pipeline_used_on_gpus_trains_what_the_plain_loop_does(tmp_path: Path) -> None:
    write_samples(tmp_path / "part.parquet")
    mp.spawn(_spawned_pipeline, (_free_port(), str(tmp_path)), nprocs=1)


def _spawned_fit(rank: int, port: int, folder: str) -> None:
    _join(rank, 2, port)
    files = SampleFiles([Path(folder) / "part.parquet"], SCHEMA, [task.name for task in TASKS])
    sharded = _sharded()
    reports: dict[int, dict[str, float]] = {}
    saved: list[Any] = []
    trainer = Trainer(
        small_config().trainer,
        TASKS,
        model=sharded.model,
        optimizer=sharded.optimizer,
        device=CPU,
        hooks=TrainingHooks(
            report=lambda step, _, metrics: reports.__setitem__(step, metrics),
            save=saved.append,
            validated=lambda *_: None,
        ),
    )
    source = SampleLoader(files, batch_size_per_rank=16, rank=rank, world_size=2)
    summary = trainer.fit(source)
    progress = [(p.step, p.position.model_dump_json(), p.window_TX.tolist()) for p in saved]
    torch.save(
        {
            "rows": summary.rows,
            "reports": {
                step: {k: v for k, v in m.items() if k.startswith(("train/click", "train/loss"))}
                for step, m in reports.items()
            },
            "progress": progress,
            "dense": [p.detach().clone() for p in sharded.dense_parameters.values()],
        },
        Path(folder) / f"rank{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_ranks_report_and_save_the_same(tmp_path: Path) -> None:
    write_samples(tmp_path / "part.parquet")
    mp.spawn(_spawned_fit, (_free_port(), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["reports"] == second["reports"]
    assert first["progress"] == second["progress"]
    assert first["rows"] == second["rows"] == 2 * NUM_ROWS
    clicks = sum(metrics["train/click/weight"] for metrics in first["reports"].values())
    assert clicks == 2 * NUM_ROWS
    for ours, theirs in zip(first["dense"], second["dense"], strict=True):
        assert ours.equal(theirs)
