"""Tokens rounded to the precision they are stored in; one that it cannot hold is named, not lost.

Shapes: M usable items of a batch, L token positions, H width of the tower.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from embedding.errors import UserError
from multimodal.content_config import TextTower
from multimodal.token_store import DTYPES
from multimodal.tower_files import Tower


class TokenRangeError(ValueError):
    """A tower gave a value that the stored tokens cannot hold; says of which row of the batch."""

    def __init__(self, row: int, value: float, tower: Tower) -> None:
        super().__init__(f"row {row}: {value:g} is beyond {tower.precision}")
        self.row = row
        self.value = value
        self.tower = tower

    def of_item(self, item_id: int | str) -> UserError:
        """What the user must change; `item_id` is the row's, as the catalogue has it."""
        modality = "text" if isinstance(self.tower, TextTower) else "image"
        said = f"the {modality} tower {self.tower.model!r} gives item {item_id} a token value of "
        if not math.isfinite(self.value):
            return UserError(
                f"{said}{self.value}: no item can be compared with that; check the files of the "
                f"model, or set content.{modality} to another one or to null"
            )
        largest = torch.finfo(DTYPES[self.tower.precision]).max
        return UserError(
            f"{said}{self.value:g}, beyond the largest of {self.tower.precision}, {largest:g}; set "
            f"content.{modality}.precision=bfloat16, which holds it coarsely, or float32"
        )


def rounded(exact_MLH: Tensor, mask_ML: Tensor | None, rows: Sequence[int], tower: Tower) -> Tensor:
    """The tokens in the tower's precision.

    Infinity would be stored without a sound, and every vector and gradient of its items be NaN.

    Args:
        exact_MLH: on the CPU.
        mask_ML: True where there is a token: nobody reads the others. None: everywhere.
        rows: of the batch that the M items stand in.
        tower: the recipe's.

    Raises:
        TokenRangeError: a value is beyond the precision, or not finite.
    """
    rounded_MLH = exact_MLH.to(DTYPES[tower.precision])
    is_lost_MLH = ~rounded_MLH.isfinite()
    if mask_ML is not None:
        is_lost_MLH &= mask_ML.unsqueeze(-1)
    if is_lost_MLH.any():
        item, position, column = is_lost_MLH.nonzero()[0].tolist()
        raise TokenRangeError(rows[item], float(exact_MLH[item, position, column]), tower)
    return rounded_MLH
