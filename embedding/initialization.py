"""Start values of table rows: a function of (seed, table, row, column), so no plan changes them."""

import math

import torch
from torch import Tensor

from embedding.config import TableConfig
from embedding.hashing import name_salt, salted_mix64

_ELEMENTS_PER_BLOCK = 1 << 18  # int64 temporaries stay around 2 MiB each


def init_bound(table: TableConfig) -> float:
    """Rows start uniform in [-bound, bound)."""
    return table.init_bound or 1.0 / math.sqrt(table.num_embeddings)


@torch.no_grad()
def initialize_shard(
    weight: Tensor, table: TableConfig, *, seed: int, row_offset: int = 0, column_offset: int = 0
) -> None:
    """Fill a (rows, columns) piece of the table in place, whatever piece it is.

    Element (r, c) depends only on the seed, the table's name and its place in the whole table; a
    block of rows is drawn at a time, so the temporaries are a few MiB.
    """
    num_rows, num_columns = weight.shape
    block = max(1, _ELEMENTS_PER_BLOCK // max(1, num_columns))
    salt = name_salt(f"{seed}/{table.name}")
    bound = init_bound(table)
    columns_D = torch.arange(num_columns, device=weight.device) + column_offset
    for start in range(0, num_rows, block):
        piece = weight[start : start + block]
        rows = torch.arange(start, start + piece.shape[0], device=weight.device) + row_offset
        counters = rows[:, None] * table.embedding_dim + columns_D
        bits = salted_mix64(counters, salt, counters).bitwise_and_((1 << 24) - 1)
        piece.copy_(bits.to(torch.float32).mul_(2 * bound / (1 << 24)).sub_(bound))
