"""Which saved row each row of a table starts with, where rows have changed their meaning.

Code tables need it: a refit of the codebooks gives row 17 the meaning that row 4 had.
"""

# Shapes: R rows of a table, from row 0 on.

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from embedding.errors import UserError
from embedding.warm_start_report import CarriedRows


@dataclass(frozen=True)
class RowPiece:
    """Rows of a shard that come from one block of saved rows."""

    first_saved: int
    num_saved: int
    rows: Tensor
    """Of the shard."""
    sources: Tensor
    """Rows of the block, one for each of `rows`."""
    carried: Tensor
    """Whether the optimizer state comes along."""


@dataclass(frozen=True)
class RowCarry:
    """Sources of the first R rows of a table; rows behind them keep their start values."""

    num_saved: int
    """Rows of the saved table that have a meaning."""
    source_R: Tensor
    """Saved row; -1: none."""
    carried_R: Tensor
    """Whether the row's optimizer state comes along."""

    @property
    def counts(self) -> CarriedRows:
        """Rows by what becomes of them."""
        known = int((self.source_R >= 0).sum())
        carried = int(self.carried_R.sum())
        return CarriedRows(
            carried=carried, sourced=known - carried, redrawn=len(self.source_R) - known
        )

    def check(self, table: str, rows_before: int, rows_now: int) -> None:
        """Refuse tables that these rows do not belong to.

        Raises:
            UserError: a table has fewer rows than its codebook needs.
        """
        for when, needed, found in (
            ("saved", self.num_saved, rows_before),
            ("new", len(self.source_R), rows_now),
        ):
            if found < needed:
                raise UserError(
                    f"table {table}: the {when} table has {found} rows, and its codebooks need "
                    f"{needed} (one a code, and the OOV row); it belongs to other codebooks: start "
                    "without a warm start (window.warm_start=false), or use the codebooks that it "
                    "was trained with"
                )

    def pieces(self, first: int, num_rows: int, rows_per_block: int) -> Iterator[RowPiece]:
        """What rows `first`, `first + 1`, ... of a table start with, block by block."""
        source_R = self.source_R[first : first + num_rows]
        carried_R = self.carried_R[first : first + num_rows]
        for start in range(0, self.num_saved, rows_per_block):
            count = min(rows_per_block, self.num_saved - start)
            rows = ((source_R >= start) & (source_R < start + count)).nonzero().squeeze(1)
            if rows.numel():
                yield RowPiece(start, count, rows, source_R[rows] - start, carried_R[rows])


def redrawn(num_rows: int) -> RowCarry:
    """No row has a counterpart but the OOV row."""
    source_R = torch.full((num_rows,), -1)
    source_R[0] = 0
    return RowCarry(1, source_R, source_R == 0)
