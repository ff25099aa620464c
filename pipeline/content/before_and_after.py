"""Content vectors and ID embeddings of a sample of items, before and after a run's training.

Reads the run's content artifact and its checkpoint.
"""

# Shapes: N items of the sample, D columns.

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from embedding.config import ManagedCollision, TableConfig
from embedding.feature_schema import FeatureSchema
from embedding.hashing import rows_of
from embedding.initialization import initialize_shard
from embedding.item_columns import candidate_feature
from embedding.raw_ids import Int64Array
from embedding.stored import read_companion, read_companion_rows, read_tables, take_rows
from multimodal.codes.vectors import sample_rows
from multimodal.content_config import ContentConfig
from multimodal.content_encoder import load_content_encoder, load_moments
from multimodal.content_head import trained_vectors
from multimodal.stored_content import ContentReader
from pipeline.config import Recipe
from pipeline.content.paths import ContentPaths
from pipeline.content.pictures import VectorSet
from ranking.compatibility import table_widths

MAX_ITEMS = 300
_ITEMS_AT_A_TIME = 64


def vector_sets(
    recipe: Recipe, paths: ContentPaths, checkpoint: Path
) -> tuple[Int64Array, list[VectorSet]]:
    """Raw ids of the sample, and its vectors.

    ID embeddings are left out where no feature reads item_id, and where their table has managed
    collision: which row an id owns changes in training. Before a warm-started training content is
    shown as it was before any.

    Args:
        recipe: with content.
        paths: of the run's content.
        checkpoint: directory of one step.
    """
    config = recipe.content
    assert config is not None
    reader = ContentReader(paths.index, paths.stores)
    rows = sample_rows(reader.num_items, MAX_ITEMS, seed=0)
    item_ids_N = reader.item_ids_N[rows]
    encoder = read_companion(checkpoint, "encoder/")
    (known_R,) = read_companion(checkpoint, "bank/item_ids").values()
    at_N = torch.searchsorted(known_R, torch.from_numpy(item_ids_N.copy()))
    fused_NH = take_rows(read_companion_rows(checkpoint, "bank/fused"), at_N)
    pairs = [
        ("content, before training", start_vectors(config, reader, rows, encoder)),
        ("content, after training", trained_vectors(encoder, [fused_NH])),
    ]
    table = _item_table(recipe)
    if table is not None and not isinstance(table.ids, ManagedCollision):
        at_N = rows_of(torch.from_numpy(item_ids_N.copy()), table)
        blocks = next(rows for name, rows in read_tables(checkpoint) if name == table.name)
        pairs += [
            ("ID embedding, before training", _start_rows(table, at_N, recipe)),
            ("ID embedding, after training", take_rows(blocks, at_N).float()),
        ]
    return item_ids_N, [VectorSet(title, vectors.numpy()) for title, vectors in pairs]


@torch.no_grad()
def start_vectors(
    config: ContentConfig, reader: ContentReader, rows_N: Int64Array, trained: Mapping[str, Tensor]
) -> Tensor:
    """Content vectors (N, D) of the encoder as the training of a `trained_state` started."""
    encoder = load_content_encoder(config).eval()
    load_moments(encoder, trained)
    pieces = torch.from_numpy(rows_N).split(_ITEMS_AT_A_TIME)
    return torch.cat([encoder(reader.read(part)) for part in pieces])


def _item_table(recipe: Recipe) -> TableConfig | None:
    """The table that the candidate's id is looked up in, with its true width."""
    widths: FeatureSchema = table_widths(recipe.features, recipe.ranking.model)
    feature = candidate_feature(widths)
    return None if feature is None else widths.table(feature.table)


def _start_rows(table: TableConfig, at_N: Tensor, recipe: Recipe) -> Tensor:
    """Start values are a function of their place, so single rows can be drawn again."""
    rows = torch.empty(len(at_N), table.embedding_dim)
    for row, at in zip(rows.split(1), at_N.tolist(), strict=True):
        initialize_shard(row, table, seed=recipe.ranking.trainer.seed, row_offset=at)
    return rows
