"""Cost of the dense side of a step: counted products, measured seconds of this CPU, and bytes."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from embedding.batch import RankingBatch
from embedding.feature_schema import FeatureSchema
from embedding.item_columns import item_sequences
from embedding.items import ContentVectors, ItemRows
from embedding.planning.synthetic_batches import synthetic_batch
from embedding.planning.traffic import Traffic
from embedding.planning.workload import table_loads
from embedding.tables import EmbeddedBatch
from multimodal.work_meter import WorkMeter
from pipeline.capacity.item_load import step_items
from pipeline.capacity.types import ContentCost, DenseCost
from pipeline.config import Recipe
from pipeline.content.items import content_shape
from ranking.model import RankingModel, RankingStep

_COUNTED_ROWS = 64
_HELD_ROWS = (64, 256)
_TIMED_ROWS = 512
_REPEATS = 5

_Inputs = tuple[EmbeddedBatch, RankingBatch, ContentVectors | None]


def dense_cost(
    recipe: Recipe, traffic: Traffic | None, content: ContentCost | None = None
) -> DenseCost:
    """Run the recipe's ranker, forward and backward, on a small batch of random embeddings.

    Args:
        recipe: the ranker's.
        traffic: measured lengths of lists and histories.
        content: what the recipe's content costs, where it has some: the ranker reads vectors of as
            many distinct items a row as in one rank's batch of the recipe.
    """
    shape = None if recipe.content is None else content_shape(recipe.content, recipe.features)
    model = RankingModel(
        recipe.features, recipe.ranking, tables_device=torch.device("meta"), content=shape
    )
    step = RankingStep(model, recipe.ranking)
    schema = model.tables.schema
    items_per_row = _items_per_row(recipe, content)

    def inputs(num_rows: int) -> _Inputs:
        embedded, batch = _inputs(schema, traffic, num_rows)
        return embedded, batch, _content(recipe, batch, round(num_rows * items_per_row))

    with FlopCounterMode(display=False) as counter:
        _run(step, *inputs(_COUNTED_ROWS))
    few, many = (_held_bytes(step, *inputs(num_rows)) for num_rows in _HELD_ROWS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    timed = inputs(_TIMED_ROWS)
    seconds = sorted(_timed(step, *timed) for _ in range(_REPEATS))
    torch.set_num_threads(threads)
    parameters = sum(p.numel() for n, p in step.named_parameters() if "tables" not in n.split("."))
    if content is not None and content.cic is not None:
        parameters += content.cic.parameters
    return DenseCost(
        flops_per_row=counter.get_total_flops() / _COUNTED_ROWS,
        parameters=parameters,
        cpu_seconds_per_row=seconds[_REPEATS // 2] / _TIMED_ROWS,
        precision=recipe.ranking.trainer.precision,
        activation_bytes_per_row=max(many - few, 0) / (_HELD_ROWS[1] - _HELD_ROWS[0]),
        is_averaged=recipe.ranking.trainer.ema_decay is not None,
    )


def _items_per_row(recipe: Recipe, content: ContentCost | None) -> float:
    if recipe.content is None:
        return 0.0
    assert content is not None, "the recipe has content, and its cost was not given"
    batch_size = recipe.ranking.trainer.batch_size_per_rank
    items = step_items(content.items, recipe.content.gradient, batch_size, world_size=1)
    return items.read / batch_size


def _content(recipe: Recipe, batch: RankingBatch, num_items: int) -> ContentVectors | None:
    """Random vectors of so many items (at least one), which candidates and events take in turn."""
    config = recipe.content
    if config is None:
        return None
    num_items = max(num_items, 1)
    histories = {}
    sequences = item_sequences(recipe.features) if config.in_history else {}
    for history, sequence in sequences.items():
        lengths_B = batch.unpooled[sequence].lengths().long()
        histories[history] = torch.arange(int(lengths_B.sum())) % num_items, lengths_B
    items = ItemRows.of(torch.arange(batch.num_rows) % num_items, histories)
    return ContentVectors(torch.randn(len(items.rows_U), config.dim, requires_grad=True), items)


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


def _run(
    step: RankingStep, embedded: EmbeddedBatch, batch: RankingBatch, content: ContentVectors | None
) -> None:
    step.zero_grad()
    step.model.rank(embedded, batch, content).sum().backward()


def _held_bytes(
    step: RankingStep, embedded: EmbeddedBatch, batch: RankingBatch, content: ContentVectors | None
) -> int:
    """The most that is alive at once, beside the inputs."""
    with WorkMeter() as meter:
        _run(step, embedded, batch, content)
    return meter.peak_bytes


def _timed(
    step: RankingStep, embedded: EmbeddedBatch, batch: RankingBatch, content: ContentVectors | None
) -> float:
    started = time.perf_counter()
    _run(step, embedded, batch, content)
    return time.perf_counter() - started
