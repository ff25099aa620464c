"""ID vectors of items from the table of a trained ranker."""

# Shapes: N items, R rows of the table that they have, D embedding dim.

from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from embedding.checkpoint_files import latest_step, read_manifest, step_directory
from embedding.config import OOV_ROW, TableConfig
from embedding.hashing import rows_of
from embedding.raw_ids import Int64Array
from embedding.stored import read_id_map, read_tables
from multimodal.codes.triggers import IdVectors

_NO_ROW = -1


@dataclass(frozen=True)
class RankerItems:
    """The items that a ranker has learned, and where."""

    checkpoints: Path
    """Of its training."""
    table: TableConfig
    """Looks up `item_id`."""
    counts: Path
    """`item_counts.parquet` of an ingest: the first day of every item."""
    last_day: str
    """That it was trained on. Items that came later have rows that nothing has trained."""


def ranker_vectors(ranker: RankerItems) -> IdVectors | None:
    """Vectors of the items that the ranker was trained on; one block of the table in memory.

    None where it had no such table, or one with another kind of ids.
    """
    step = latest_step(ranker.checkpoints)
    assert step is not None, ranker.checkpoints
    checkpoint = step_directory(ranker.checkpoints, step)
    saved = read_manifest(checkpoint).tables.get(ranker.table.name)
    if saved is None or saved.ids != ranker.table.ids.kind:
        return None
    table = ranker.table.model_copy(update={"num_embeddings": saved.num_rows})
    item_ids = _trained_items(ranker)
    rows = _rows(checkpoint, table, item_ids)
    has_row = rows != _NO_ROW
    rows_R, place_N = np.unique(rows[has_row], return_inverse=True)
    vectors_RD = np.empty((len(rows_R), saved.num_columns), np.float32)
    for name, blocks in read_tables(checkpoint):
        if name != table.name:
            continue
        for first, block in blocks:
            start, end = np.searchsorted(rows_R, [first, first + len(block)])
            wanted = torch.from_numpy(rows_R[start:end] - first)
            vectors_RD[start:end] = block[wanted].float().numpy()
    return IdVectors.shared(item_ids[has_row], place_N, vectors_RD)


def _trained_items(ranker: RankerItems) -> Int64Array:
    counts = pq.read_table(ranker.counts, columns=["item_id", "first_day"])
    last = pa.scalar(date.fromisoformat(ranker.last_day), pa.date32())
    ids: Int64Array = counts.filter(pc.less_equal(counts["first_day"], last))["item_id"].to_numpy()
    return ids


def _rows(checkpoint: Path, table: TableConfig, item_ids_N: Int64Array) -> Int64Array:
    """The row of every item; -1 for those that share one with all unknown ids."""
    mixed_N = rows_of(torch.tensor(item_ids_N), table).numpy()
    if table.ids.kind != "managed_collision":
        return np.where(mixed_N == OOV_ROW, _NO_ROW, mixed_N)
    owners = read_id_map(checkpoint, table.name).numpy()
    by_id = np.argsort(owners, kind="stable")
    at_N = np.searchsorted(owners, mixed_N, sorter=by_id).clip(max=len(owners) - 1)
    rows_N = by_id[at_N]
    return np.where(owners[rows_N] == mixed_N, rows_N, _NO_ROW)
