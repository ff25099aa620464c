"""Rows of the code tables when a ranker starts from one that was trained with other codebooks."""

import numpy as np
import torch

from embedding.config import FeatureSchema
from embedding.errors import UserError
from embedding.row_carry import RowCarry, redrawn
from multimodal.codebook_match import Carry
from multimodal.codebook_versions import carries_between, descends
from pipeline.train import CodebookChange


def row_carries(change: CodebookChange, schema: FeatureSchema) -> dict[str, RowCarry]:
    """What every row of each code table starts with, by table.

    Codebooks that go on with the earlier ones carry their rows. Renumbered ones (`keep_meaning:
    false`, or no common items) give nothing to carry: all tables that codes index start anew.

    Raises:
        UserError: an unknown version, or a table that is too small for its codes.
    """
    columns = {f.table: f.column_name for f in schema.sparse if f.source == "codes"}
    columns |= {f.table: f.column_name for f in schema.sequences if f.source == "codes"}
    own = {f.table for f in schema.sparse if f.source != "codes"}
    own |= {f.table for f in schema.sequences if f.source != "codes"}
    tables = {t: column.split(":")[-1] for t, column in columns.items() if t not in own}
    if not descends(change.root, change.before, change.after):
        return {table: redrawn(schema.table(table).num_embeddings) for table in tables}
    carries = carries_between(change.root, change.before, change.after)
    return {
        table: _row_carry(table, carries[column], schema)
        for table, column in tables.items()
        if column in carries
    }


def _row_carry(table: str, carry: Carry, schema: FeatureSchema) -> RowCarry:
    """Code c has row c + 1; the OOV row goes on where there was a table."""
    rows = schema.table(table).num_embeddings
    if rows < len(carry.source_K) + 1:
        raise UserError(
            f"table {table} has {rows} rows, and its codebook {len(carry.source_K)} codes (and the "
            "OOV row); the codebooks belong to other settings of codes"
        )
    known = carry.num_before > 0
    source_R = np.concatenate([[0 if known else -1], carry.source_K + (carry.source_K >= 0)])
    carried_R = np.concatenate([[known], carry.carried_K])
    return RowCarry(
        carry.num_before + 1 if known else 0,
        torch.from_numpy(source_R.astype(np.int64)),
        torch.from_numpy(carried_R.astype(np.bool_)),
    )
