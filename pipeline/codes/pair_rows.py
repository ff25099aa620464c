"""The pairs that an alignment trains on, as content rows in files: ranks read what they draw.

    item2item.bin, user2item.bin   int32, trigger and target of every pair

Pairs of an item without content are left out, the others keep their order.
"""

# Shapes: N items, P pairs of a source.

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from embedding.items import NO_CONTENT, ItemIndex
from embedding.raw_ids import Int64Array
from multimodal.codes.vectors import Int32Array

_COLUMNS = {"item2item": ("item", "neighbour"), "user2item": ("trigger", "target")}
_PAIRS_PER_BLOCK = 1 << 20


def write_pair_rows(pairs: Path, item_ids_N: Int64Array, directory: Path) -> None:
    """Write the pairs of a mining; memory holds a block of them.

    Args:
        pairs: what `pipeline.codes.mine_pairs` wrote.
        item_ids_N: raw ids by content row.
        directory: an existing one.
    """
    assert len(item_ids_N) <= np.iinfo(np.int32).max
    index = ItemIndex(torch.tensor(item_ids_N))
    for source, columns in _COLUMNS.items():
        with (directory / f"{source}.bin").open("wb") as file:
            for part in sorted((pairs / source).glob("*.parquet")):
                with pq.ParquetFile(part) as mined:
                    for batch in mined.iter_batches(_PAIRS_PER_BLOCK, columns=list(columns)):
                        ids_P2 = np.stack([batch[name].to_numpy() for name in columns], axis=1)
                        rows_P2 = index.rows_of(torch.from_numpy(ids_P2)).numpy()
                        known_P = (rows_P2 != NO_CONTENT).all(axis=1)
                        rows_P2[known_P].astype(np.int32).tofile(file)


def read_pair_rows(directory: Path) -> dict[str, Int32Array]:
    """Pairs (P, 2) by source, memory-mapped; without those that have none."""
    files = {source: directory / f"{source}.bin" for source in _COLUMNS}
    return {
        source: np.memmap(file, np.int32, "r").reshape(-1, 2)
        for source, file in files.items()
        if file.stat().st_size
    }
