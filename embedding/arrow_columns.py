"""Columns of an Arrow table as tensors, copied once; lists as values and offsets."""

# Shapes: R rows, F columns, N values of all lists of a column.

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from embedding.errors import UserError


def stack_floats(table: pa.Table, names: Sequence[str]) -> Tensor:
    """Float columns side by side: float32 (R, F), NaN for null."""
    stacked_RF = np.empty((table.num_rows, len(names)), dtype=np.float32)
    for i, name in enumerate(names):
        start = 0
        for chunk in table.column(name).chunks:
            stacked_RF[start : start + len(chunk), i] = chunk.to_numpy(zero_copy_only=False)
            start += len(chunk)
    return torch.from_numpy(stacked_RF)


def int64(table: pa.Table, name: str) -> Tensor:
    """A column of ids, (R,).

    Raises:
        UserError: it holds a null.
    """
    column = table.column(name)
    _refuse_nulls(name, column.null_count)
    return _join([chunk.to_numpy() for chunk in column.chunks])


def int64_lists(table: pa.Table, name: str) -> tuple[Tensor, Tensor]:
    """Values (N,) and offsets (R + 1,) of a list column; a null list is an empty one.

    Raises:
        UserError: a list holds a null.
    """
    chunks = table.column(name).chunks
    values = [chunk.flatten() for chunk in chunks]
    _refuse_nulls(name, sum(value.null_count for value in values))
    lengths = [pc.fill_null(pc.list_value_length(chunk), 0).to_numpy() for chunk in chunks]
    return _join([v.to_numpy() for v in values]), offsets_of(_join(lengths).to(torch.int64))


def take_segments(values_N: Tensor, offsets: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Segments of a jagged column in a new order.

    values 1 2 | | 3 4 5, order 2 0  ->  values 3 4 5 | 1 2
    """
    starts = offsets[order]
    lengths = offsets[order + 1] - starts
    taken_offsets = offsets_of(lengths)
    total = int(taken_offsets[-1])
    shift = torch.repeat_interleave(starts - taken_offsets[:-1], lengths, output_size=total)
    return values_N[shift.add_(torch.arange(total))], taken_offsets


def offsets_of(lengths: Tensor) -> Tensor:
    """Where lists of these lengths (R,) begin and end, (R + 1,)."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return offsets


def _join(arrays: list[npt.NDArray[np.int64]]) -> Tensor:
    if not arrays:
        return torch.empty(0, dtype=torch.int64)
    if len(arrays) == 1 and arrays[0].flags.writeable:
        return torch.from_numpy(arrays[0])
    return torch.from_numpy(np.concatenate(arrays))  # Arrow memory is read-only for torch


def _refuse_nulls(column: str, num_nulls: int) -> None:
    if num_nulls:
        raise UserError(
            f"column {column!r} holds {num_nulls} nulls, but samples mark a missing id with -1; "
            "run the join stage again"
        )
