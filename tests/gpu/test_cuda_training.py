"""The training loop on a GPU: what it reads overlaps, and it reports what the CPU's loop does."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from embedding.config import RowWiseAdagrad, ShardingConfig
from embedding.loader import SampleFiles, SampleLoader
from ranking.classifier_config import DeepFm
from ranking.config import ModelConfig, RankingConfig, TaskConfig
from ranking.experts_config import ProgressiveExtractionConfig
from ranking.interest_config import Dien, Din, Hstu
from ranking.model import RankingModel, RankingStep
from ranking.steps import PipelinedSteps
from ranking.trainer import Trainer, TrainingHooks
from tests.planned import shard_planned
from tests.ranking.small_run import SCHEMA, small_config, write_samples

pytestmark = pytest.mark.gpu

TASKS = (TaskConfig(name="click"), TaskConfig(name="like", after="click"))


@pytest.fixture
def files(tmp_path: Path) -> SampleFiles:
    write_samples(tmp_path / "part.parquet")
    return SampleFiles([tmp_path / "part.parquet"], SCHEMA, [task.name for task in TASKS])


def test_batches_lie_in_page_locked_memory(cuda, files: SampleFiles) -> None:
    with SampleLoader(files, batch_size_per_rank=16, pin_memory=True).sequential() as stream:
        for batch in stream:
            parts = [batch.dense_BF, batch.labels_BT, batch.weights_BT, batch.keys_BK]
            parts += [kjt.values() for kjt in (batch.pooled, batch.unpooled)]
            assert all(part.is_pinned() for part in parts)


def test_a_run_reports_and_validates_what_it_does_on_the_cpu(group, files: SampleFiles) -> None:
    cpu, gpu = (_fit(files, device) for device in (torch.device("cpu"), group))
    assert gpu["steps"] == cpu["steps"]
    assert gpu["losses"] == pytest.approx(cpu["losses"], rel=1e-3)
    assert gpu["validated"] == pytest.approx(cpu["validated"], rel=1e-3)


def _fit(files: SampleFiles, device: torch.device) -> dict[str, Any]:
    """A run with a task after another and all kinds of histories, without dropout."""
    config = RankingConfig(
        tasks=TASKS,
        model=ModelConfig(
            interests=(Din(history="past"), Dien(history="past"), Hstu(history="past")),
            classifier=DeepFm(hidden=(16,)),
            experts=ProgressiveExtractionConfig(),
        ),
        trainer=small_config(max_grad_norm=1.0).trainer,
    )
    sharded = shard_planned(
        RankingStep(
            RankingModel(SCHEMA, config, tables_device=torch.device("meta")),
            config,
            embedding_l2=0.01,
        ),
        optimizer=RowWiseAdagrad(),
        sharding=ShardingConfig(ranks_per_host=1),
        dense_optimizer=partial(torch.optim.SGD, lr=0.05),
        device=device,
    )
    sharded.initialize(seed=0)
    losses: list[float] = []
    validated: list[float] = []
    trainer = Trainer(
        config.trainer,
        config.tasks,
        model=sharded.model,
        optimizer=sharded.optimizer,
        device=device,
        hooks=TrainingHooks(
            report=lambda _reached, metrics: losses.append(metrics["train/loss"]),
            save=lambda _progress: None,
            validated=lambda _reached, metrics: validated.extend(
                value for name, value in metrics.items() if name.endswith("logloss")
            ),
        ),
    )
    assert isinstance(trainer.steps, PipelinedSteps) == (device.type == "cuda")
    loader = partial(SampleLoader, files, batch_size_per_rank=16)
    pinned = device.type == "cuda"
    summary = trainer.fit(loader(pin_memory=pinned), validation=loader(pin_memory=pinned))
    assert validated
    return {"steps": summary.steps, "losses": losses, "validated": validated}
