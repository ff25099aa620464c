"""The workload that the loader and training benchmarks share: its data, and three models."""

import logging
import os
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from embedding.arrow import SingleIds
from embedding.batch import RankingBatch
from embedding.config import (
    RowWiseAdagrad,
    ShardingConfig,
    SparseOptimizer,
    TableConfig,
)
from embedding.feature_schema import DenseFeature, FeatureSchema, SparseFeature
from embedding.planning.demand import step_settings
from embedding.planning.plan_description import PlanDescription
from embedding.planning.planner import PlanRequest, plan_tables
from embedding.planning.this_machine import local_shape
from embedding.samples import KEYS
from embedding.shard import Sharded, shard
from embedding.tables import EmbeddedBatch, EmbeddingTables
from ranking.classifier_config import DcnV2, DeepFm, Ipnn
from ranking.compatibility import table_widths
from ranking.config import ModelConfig, RankingConfig, TaskConfig, TrainerConfig
from ranking.fgcnn_config import Fgcnn
from ranking.model import Ranker, RankingModel, RankingStep

NUM_SPARSE, NUM_DENSE = 26, 13
ROWS_PER_TABLE = 34_616  # 26 tables, 0.9 M rows in all
ROW_GROUP_ROWS = 65_536
BATCH_SIZE = 4096
MODELS = {
    "deepfm": ModelConfig(classifier=DeepFm(hidden=(1024, 512, 256))),
    "dcnv2": ModelConfig(classifier=DcnV2(num_cross_layers=3, hidden=(1024, 512))),
    "fgcnn": ModelConfig(
        generator=Fgcnn(
            maps=(14, 16, 18, 20), heights=(7, 7, 7, 7), pools=(2, 2, 2, 2), new_maps=(2, 2, 2, 2)
        ),
        classifier=Ipnn(hidden=(1024, 512)),
    ),
}
CPU = torch.device("cpu")

SCHEMA = FeatureSchema(
    tables=tuple(
        TableConfig(name=f"t{i}", num_embeddings=ROWS_PER_TABLE) for i in range(NUM_SPARSE)
    ),
    sparse=tuple(SparseFeature(name=f"s{i}", table=f"t{i}") for i in range(NUM_SPARSE)),
    dense=tuple(DenseFeature(name=f"d{i}") for i in range(NUM_DENSE)),
)


def config(
    model: str = "deepfm", precision: str = "fp32", *, compiled: bool = False
) -> RankingConfig:
    """One task, one of `MODELS`, one epoch."""
    return RankingConfig(
        tasks=(TaskConfig(name="click"),),
        model=MODELS[model].model_copy(update={"compile": compiled}),
        trainer=TrainerConfig(
            batch_size_per_rank=BATCH_SIZE,
            precision=precision,
            log_every_steps=10,
            checkpoint_every_steps=None,
        ),
    )


def gemm_flop_per_row(model: str, schema: FeatureSchema = SCHEMA) -> float:
    """Multiplications and additions of a step's products, counted as they run on a small batch.

    Forward, input gradient and weight gradient of linear layers, batched products and
    convolutions; the fields' gradient counts, as the tables need it.
    """
    settings = config(model)
    ranker = Ranker(schema, settings.model, num_tasks=1, autocast=False)
    widths = [t.embedding_dim for t in table_widths(schema, settings.model).tables]
    size = 32
    embedded = EmbeddedBatch(
        fields_BD=torch.randn(size, sum(widths), requires_grad=True),
        field_names=tuple(feature.name for feature in schema.sparse),
        field_dims=tuple(widths),
        sequences={},
        lengths={},
    )
    with FlopCounterMode(display=False) as counter:
        ranker(embedded, torch.randn(size, len(schema.dense))).sum().backward()
    return counter.get_total_flops() / size


def write_samples(path: Path, num_rows: int) -> None:
    """Sample files with skewed 40-bit ids and a label that depends on them."""
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, _arrow_schema()) as writer:
        for _ in range(0, num_rows, ROW_GROUP_ROWS):
            writer.write_table(_row_group(rng), row_group_size=ROW_GROUP_ROWS)


def build(
    rank: int,
    world_size: int,
    port: int,
    settings: RankingConfig | None = None,
    *,
    schema: FeatureSchema = SCHEMA,
    optimizer: RowWiseAdagrad = RowWiseAdagrad(),  # noqa: B008 # frozen
) -> Sharded:
    """Join a gloo group on loopback and shard the model over it."""
    join_group(rank, world_size, port, CPU)
    return build_sharded(settings or config(), CPU, schema=schema, optimizer=optimizer)


def join_group(rank: int, world_size: int, port: int, device: torch.device) -> None:
    """A process group on loopback, with NCCL for what lies on GPUs."""
    for name in ("torchrec", "fbgemm_gpu", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size)


def build_sharded(
    settings: RankingConfig,
    device: torch.device,
    *,
    schema: FeatureSchema = SCHEMA,
    optimizer: RowWiseAdagrad = RowWiseAdagrad(),  # noqa: B008 # frozen
) -> Sharded:
    """The model, sharded over the process group."""
    ranking = RankingModel(schema, settings, tables_device=torch.device("meta"))
    model = RankingStep(ranking, settings)
    adam = settings.trainer.dense_optimizer
    sharded = shard(
        model,
        optimizer=optimizer,
        sharding=ShardingConfig(),
        dense_optimizer=lambda parameters: torch.optim.AdamW(
            parameters, lr=adam.learning_rate, weight_decay=adam.weight_decay, fused=True
        ),
        device=device,
        plan=plan_here(model, optimizer, device),
    )
    sharded.initialize(seed=0)
    return sharded


def plan_here(
    model: nn.Module, optimizer: SparseOptimizer, device: torch.device
) -> PlanDescription:
    """A plan for the running process group; every rank makes the same."""
    sharding = ShardingConfig()
    request = PlanRequest(
        schema=cast(EmbeddingTables, model.tables).schema,
        shape=local_shape(sharding, dist.get_world_size(), str(device)),
        settings=step_settings(1024, optimizer, sharding),
        tables_path=next(name for name, each in model.named_modules() if each is model.tables),
    )
    return plan_tables(request)


def _arrow_schema() -> pa.Schema:
    return pa.schema(
        [(f"key:{key}", pa.int64()) for key in KEYS]
        + [("label:click", pa.float32())]
        + [(f"dense:d{i}", pa.float32()) for i in range(NUM_DENSE)]
        + [(f"sparse:s{i}", pa.int64()) for i in range(NUM_SPARSE)]
    )


def _row_group(rng: np.random.Generator) -> pa.Table:
    num_rows = ROW_GROUP_ROWS
    ids = rng.zipf(1.2, (NUM_SPARSE, num_rows)).clip(max=10**12).astype(np.int64)
    labels = (ids[0] % 3 == 0) ^ (rng.random(num_rows) < 0.2)
    columns = [rng.integers(0, 2**62, num_rows) for _ in KEYS]
    columns.append(labels.astype(np.float32))
    columns += [rng.standard_normal(num_rows, dtype=np.float32) for _ in range(NUM_DENSE)]
    columns += list(ids * 7_919 % 2**40)
    return pa.table(columns, schema=_arrow_schema())


def random_batch(size: int = BATCH_SIZE) -> RankingBatch:
    """Rows with random ids, numbers and labels, on the CPU."""
    names = tuple(feature.name for feature in SCHEMA.sparse)
    rows = tuple(torch.randint(0, ROWS_PER_TABLE, (size,)) for _ in names)
    return RankingBatch(
        dense_BF=torch.randn(size, NUM_DENSE),
        pooled=SingleIds(names, rows).to_kjt(),
        unpooled=SingleIds((), ()).to_kjt(),
        labels_BT=torch.randint(0, 2, (size, 1)).float(),
        weights_BT=torch.ones(size, 1),
        keys_BK=torch.zeros(size, 4, dtype=torch.int64),
        num_rows=size,
    )
