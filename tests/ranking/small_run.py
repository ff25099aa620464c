"""A small two-task run: schema, configuration and sample file for the training tests."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedding.config import TableConfig
from embedding.feature_schema import (
    DenseFeature,
    FeatureSchema,
    HistoryConfig,
    SequenceFeature,
    SparseFeature,
)
from ranking.classifier_config import DeepFm
from ranking.config import ModelConfig, RankingConfig, TaskConfig
from ranking.experts_config import MixtureOfExpertsConfig
from ranking.interest_config import Din
from ranking.trainer_config import TrainerConfig

NUM_ROWS = 300
SCHEMA = FeatureSchema(
    tables=(
        TableConfig(name="user", num_embeddings=30),
        TableConfig(name="item", num_embeddings=20),
    ),
    sparse=(
        SparseFeature(name="user_id", table="user"),
        SparseFeature(name="item_id", table="item"),
    ),
    dense=(DenseFeature(name="age"),),
    histories=(HistoryConfig(name="past"),),
    sequences=(SequenceFeature(name="past_item", history="past", table="item", target="item_id"),),
)
TASKS = (TaskConfig(name="click"), TaskConfig(name="like", weight=2.0))


def small_config(**trainer: Any) -> RankingConfig:
    settings = {
        "epochs": 2,
        "batch_size_per_rank": 16,
        "log_every_steps": 4,
        "checkpoint_every_steps": 7,
        **trainer,
    }
    return RankingConfig(
        tasks=TASKS,
        model=ModelConfig(
            interests=(Din(history="past", hidden=(8,)),),
            classifier=DeepFm(hidden=(16,), dropout=0.2),
            experts=MixtureOfExpertsConfig(num_experts=2, expert_hidden=(8,), tower_hidden=(4,)),
        ),
        trainer=TrainerConfig(**settings),
    )


def write_samples(path: Path, seed: int = 0) -> None:
    """NUM_ROWS rows in row groups of 50; `like` is missing on 30% of them."""
    rng = np.random.default_rng(seed)
    like = rng.integers(0, 2, NUM_ROWS).astype(object)
    like[rng.random(NUM_ROWS) < 0.3] = None
    columns: dict[str, Any] = {
        f"key:{key}": np.arange(NUM_ROWS) + i
        for i, key in enumerate(("request_id", "user_id", "item_id", "timestamp"))
    }
    columns |= {
        "label:click": rng.integers(0, 2, NUM_ROWS).astype(np.float32),
        "label:like": pa.array(like.tolist(), pa.float32()),
        "dense:age": rng.normal(size=NUM_ROWS).astype(np.float32),
        "sparse:user_id": rng.integers(0, 1000, NUM_ROWS),
        "sparse:item_id": rng.integers(0, 1000, NUM_ROWS),
        "sequence:past_item": pa.array(
            [rng.integers(0, 1000, rng.integers(0, 5)).tolist() for _ in range(NUM_ROWS)],
            pa.list_(pa.int64()),
        ),
    }
    pq.write_table(pa.table(columns), path, row_group_size=50)
