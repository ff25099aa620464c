"""Cost of the dense side of a step: counted products on GPUs, measured seconds on this CPU."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from embedding.batch import RankingBatch
from embedding.config import FeatureSchema
from embedding.synthetic_batches import synthetic_batch
from embedding.tables import EmbeddedBatch
from embedding.traffic import Traffic
from embedding.workload import table_loads
from pipeline.capacity_types import DenseCost
from pipeline.config import Recipe
from ranking.model import RankingModel, RankingStep

_COUNTED_ROWS = 64
_TIMED_ROWS = 512
_REPEATS = 5


def dense_cost(recipe: Recipe, traffic: Traffic | None) -> DenseCost:
    """Run the recipe's ranker, forward and backward, on a small batch of random embeddings."""
    model = RankingModel(recipe.features, recipe.ranking, tables_device=torch.device("meta"))
    step = RankingStep(model, recipe.ranking)
    schema = model.tables.schema
    with FlopCounterMode(display=False) as counter:
        _run(step, *_inputs(schema, traffic, _COUNTED_ROWS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inputs = _inputs(schema, traffic, _TIMED_ROWS)
    seconds = sorted(_timed(step, *inputs) for _ in range(_REPEATS))
    torch.set_num_threads(threads)
    parameters = sum(p.numel() for n, p in step.named_parameters() if "tables" not in n.split("."))
    return DenseCost(
        flops_per_row=counter.get_total_flops() / _COUNTED_ROWS,
        parameters=parameters,
        cpu_seconds_per_row=seconds[_REPEATS // 2] / _TIMED_ROWS,
        precision=recipe.ranking.trainer.precision,
    )


def _inputs(
    schema: FeatureSchema, traffic: Traffic | None, num_rows: int
) -> tuple[EmbeddedBatch, RankingBatch]:
    batch = synthetic_batch(schema, table_loads(schema, traffic), num_rows, seed=0)
    dims = tuple(schema.table(feature.table).embedding_dim for feature in schema.sparse)
    keys = batch.unpooled.keys()
    lengths = batch.unpooled.lengths().view(len(keys), -1) if keys else None
    sequences, by_history = {}, {}
    for feature in schema.sequences:
        assert lengths is not None
        length_B = lengths[keys.index(feature.name)]
        dim = schema.table(feature.table).embedding_dim
        vectors = torch.randn(int(length_B.sum()), dim, requires_grad=True)
        sequences[feature.name], by_history[feature.history] = vectors, length_B
    embedded = EmbeddedBatch(
        fields_BD=torch.randn(num_rows, sum(dims), requires_grad=True),
        field_names=tuple(feature.name for feature in schema.sparse),
        field_dims=dims,
        sequences=sequences,
        lengths=by_history,
        gap_rows={
            feature.name: batch.unpooled[feature.name].values()
            for feature in schema.sequences
            if feature.source == "gap"
        },
    )
    return embedded, batch


def _run(step: RankingStep, embedded: EmbeddedBatch, batch: RankingBatch) -> None:
    step.zero_grad()
    step.model.rank(embedded, batch).sum().backward()


def _timed(step: RankingStep, embedded: EmbeddedBatch, batch: RankingBatch) -> float:
    started = time.perf_counter()
    _run(step, embedded, batch)
    return time.perf_counter() - started
