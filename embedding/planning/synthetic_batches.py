"""Batches with the ids that a table load describes, for timing plans without data."""

# Shapes: B samples, N ids of one feature.

import math

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embedding.batch import RankingBatch
from embedding.feature_schema import FeatureSchema, SequenceFeature, SparseFeature
from embedding.hashing import rows_of
from embedding.planning.id_distribution import draw
from embedding.planning.workload import TableLoad
from embedding.samples import KEYS


def synthetic_batch(
    schema: FeatureSchema, loads: list[TableLoad], batch_size: int, seed: int
) -> RankingBatch:
    """One rank's batch: lengths around the features' means, ids as popular as the loads say."""
    rng = np.random.default_rng(seed)
    by_table = {load.name: load for load in loads}
    means = _means(schema, loads)
    lengths = {f.name: _lengths(f, means[f.name], batch_size, rng) for f in schema.id_features}
    for sequence in schema.sequences:
        # Attributes of one history have equally many events.
        first = next(s for s in schema.sequences if s.history == sequence.history)
        lengths[sequence.name] = lengths[first.name]

    def jagged(features: tuple[SparseFeature | SequenceFeature, ...]) -> KeyedJaggedTensor:
        parts = [_ids(by_table[f.table], int(lengths[f.name].sum()), rng) for f in features]
        return KeyedJaggedTensor(
            keys=[f.name for f in features],
            values=torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64),
            lengths=torch.from_numpy(
                np.concatenate([lengths[f.name] for f in features])
                if features
                else np.zeros(0, np.int32)
            ),
        )

    return RankingBatch(
        dense_BF=torch.zeros(batch_size, len(schema.dense)),
        pooled=jagged(schema.pooled_features),
        unpooled=jagged((*schema.unpooled_features, *schema.sequences)),
        labels_BT=torch.zeros(batch_size, 1),
        weights_BT=torch.ones(batch_size, 1),
        keys_BK=torch.zeros(batch_size, len(KEYS), dtype=torch.int64),
        num_rows=batch_size,
    )


def _means(schema: FeatureSchema, loads: list[TableLoad]) -> dict[str, float]:
    means: dict[str, float] = {}
    for load in loads:
        features = [f for f in schema.id_features if f.table == load.name]
        means |= {f.name: m for f, m in zip(features, load.ids_per_sample, strict=True)}
    return means


def _lengths(
    feature: SparseFeature | SequenceFeature, mean: float, batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    if mean == 1.0 and isinstance(feature, SparseFeature):
        return np.ones(batch_size, dtype=np.int32)
    return rng.poisson(mean, batch_size).astype(np.int32)


def _ids(load: TableLoad, size: int, rng: np.random.Generator) -> Tensor:
    ranks_N = draw(load.ids, size, rng)
    if load.managed:
        return rows_of(torch.from_numpy(ranks_N), load.table)
    # Popular rows lie anywhere in the table, as hashing puts them.
    step = _coprime_step(load.num_rows)
    return torch.from_numpy(ranks_N * step % load.num_rows)


def _coprime_step(num_rows: int) -> int:
    step = max(1, int(num_rows * 0.6180339887))
    while math.gcd(step, num_rows) != 1:
        step += 1
    return step
