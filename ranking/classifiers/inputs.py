"""What every classifier reads, and how it reads it.

Fields (embeddings, and the generator's new features) are what interactions multiply. Dense features
and interest vectors enter as columns: of the first-order term, and of the MLP where there is one.
The first-order weight of an id is a linear map of its embedding, where the papers have a number of
its own (docs/models.md says why). Its one column goes to the head, which weighs it for every task.
"""

# Shapes: B samples, F fields, D embedding dim, X any width.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedding.errors import UserError

_COLUMN_MULTIPLE = 16


def filled_width(width: int) -> int:
    """Columns of `filled` parts together with those before them."""
    return width + -width % _COLUMN_MULTIPLE


def filled(parts: Sequence[Tensor], before: int = 0) -> list[Tensor]:
    """Parts (B, X) to stand behind `before` more columns, and zeros behind them.

    These fill everything up to a multiple of 16: fp32 products with an odd width take a fifth
    longer on CPU.
    """
    width = before + sum(part.shape[1] for part in parts)
    zeros_BX = parts[0].new_zeros(parts[0].shape[0], filled_width(width) - width)
    return [part for part in (*parts, zeros_BX) if part.shape[1]]


@dataclass(frozen=True)
class InputDims:
    """Widths of what a classifier reads."""

    fields: tuple[tuple[str, int], ...]
    """(name, dim) of every field."""
    num_dense: int
    interest: int
    """Width of all interest vectors together."""

    @property
    def columns(self) -> int:
        """Columns of all fields, dense features and interests."""
        return sum(dim for _, dim in self.fields) + self.num_dense + self.interest

    def flat(self, before: int = 0) -> int:
        """Width of `ClassifierInputs.flat` with `before` more columns, filling included."""
        return filled_width(before + self.columns)

    @property
    def num_fields(self) -> int:
        """Fields."""
        return len(self.fields)

    def common_field_dim(self, needed_by: str) -> int:
        """The one dim of all fields.

        Raises:
            UserError: the fields' dims differ.
        """
        dims = {dim for _, dim in self.fields}
        if len(dims) != 1:
            raise UserError(
                f"{needed_by} combines embeddings of one dim, but the fields have dims "
                f"{dict(self.fields)}; give their tables one embedding_dim, or set "
                "ranking.model.field_dim to project them"
            )
        return dims.pop()


@dataclass(frozen=True)
class ClassifierInputs:
    """What a classifier reads of one batch; all of one dtype."""

    fields_BX: Tensor
    """The vectors of all fields, side by side."""
    dense_BX: Tensor
    interests_BX: Tensor

    def flat(self, *before: Tensor) -> Tensor:
        """`before` and everything side by side, as wide as `InputDims.flat` says."""
        return torch.cat([*before, *self.parts(sum(part.shape[1] for part in before))], dim=1)

    def parts(self, before: int = 0) -> list[Tensor]:
        """Everything in pieces, filled up, to stand behind `before` more columns."""
        return filled([self.fields_BX, self.dense_BX, self.interests_BX], before)

    def stacked(self, dim: int) -> Tensor:
        """The fields as (B, F, D), a view; all have the dim `dim`."""
        return self.fields_BX.view(self.fields_BX.shape[0], -1, dim)
