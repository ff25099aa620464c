"""Rows of the code tables when a ranker starts from one that was trained with other codebooks."""

import math
from collections.abc import Mapping

import numpy as np
import torch

from embedding.errors import UserError
from embedding.feature_schema import FeatureSchema
from embedding.row_carry import RowCarry, redrawn
from multimodal.codes.match import Carry
from multimodal.codes.versions import are_related, carries_between
from pipeline.train import CodebookChange

USER_CODE = "user_code_"
"""Beginning of the tables of users and code prefixes."""
LEAST_CARRIED = 0.5
"""Share of code prefixes that go on, below which rows of users and codes start anew."""


def row_carries(change: CodebookChange, schema: FeatureSchema) -> dict[str, RowCarry]:
    """What every row of each code table starts with, by table.

    Codebooks that go on with the earlier ones carry their rows, and so do those of a rollback.
    Renumbered ones (`keep_meaning: false`, or no common items) give nothing to carry: all tables
    that codes index start anew.

    Rows of a user and a code lie at a hash of both, so those of codes that changed their meaning
    cannot be told apart. They go on with the others as long as most codes did, and what they had
    learned of the earlier items fades as they train; else the table starts anew.

    Raises:
        UserError: an unknown version, or a table that is too small for its codes.
    """
    # A table that only codes read has the name of their column.
    derived = {f.table for f in schema.id_features if f.source == "codes"}
    tables = derived - {f.table for f in schema.id_features if f.source != "codes"}
    if not are_related(change.root, change.before, change.after):
        return {table: redrawn(schema.table(table).num_embeddings) for table in tables}
    carries = carries_between(change.root, change.before, change.after)
    found = {
        table: _row_carry(table, carries[table], schema) for table in tables if table in carries
    }
    for table in tables:
        depth = table.removeprefix(USER_CODE)
        if depth != table and _share_carried(carries, int(depth)) < LEAST_CARRIED:
            found[table] = redrawn(schema.table(table).num_embeddings)
    return found


def _share_carried(carries: Mapping[str, Carry], depth: int) -> float:
    """About the share of code prefixes whose codes all go on."""
    levels = (carries.get(f"sid_{level}") for level in range(depth))
    return math.prod(0.0 if level is None else level.share_carried for level in levels)


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
