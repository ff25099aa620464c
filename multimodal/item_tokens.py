"""Texts and images of items -> tokens of the frozen lower layers, as the token store holds them.

Shapes: N items of a batch, M usable ones among them, L token positions, H width of the tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from multimodal.item_inputs import Preparer
from multimodal.token_batch import ModalityTokens
from multimodal.token_range import rounded
from multimodal.token_store import DTYPES
from multimodal.tower_files import Tower
from multimodal.towers import SplitTower


@dataclass(frozen=True)
class EncodedItems:
    """Tokens of the usable items of a batch, on the CPU."""

    faults: list[str | None]
    """N of them: why an item has no tokens; None where it has."""
    tokens_MLH: Tensor
    """In the store's precision."""
    lengths_M: Tensor
    """int32."""
    is_cut: list[bool]
    """M of them: the text went on beyond `max_tokens`."""

    def of_all_items(self) -> ModalityTokens:
        """Tokens of all N items, as they are read from a store."""
        usable = torch.tensor([fault is None for fault in self.faults], dtype=torch.bool)
        longest, width = self.tokens_MLH.shape[1:]
        tokens_NLH = torch.zeros(len(usable), longest, width, dtype=self.tokens_MLH.dtype)
        tokens_NLH[usable] = self.tokens_MLH
        length_N = torch.zeros(len(usable), dtype=torch.int32)
        length_N[usable] = self.lengths_M
        return ModalityTokens(tokens_NLH, torch.arange(longest) < length_N.unsqueeze(1))


class LowerEncoder:
    """Prepares values of one modality and runs the lower layers of its tower.

    Args:
        split: the tower; of its upper part only the width counts.
        prepare: makes the model's inputs.
        tower: the recipe's; tokens are rounded to its precision.
        device: of the lower layers.
    """

    def __init__(
        self, split: SplitTower, prepare: Preparer, tower: Tower, device: torch.device
    ) -> None:
        self.lower = split.lower.to(device)
        self.hidden_size = split.upper.hidden_size
        self.prepare = prepare
        self.tower = tower
        self.dtype = DTYPES[tower.precision]
        self.device = device

    def __call__(self, values: Sequence[Any]) -> EncodedItems:
        """Encode values as they stand in items.parquet.

        Raises:
            TokenRangeError: a token is beyond the precision, or not finite.
        """
        prepared = self.prepare(values)
        num_usable = len(prepared.is_cut)
        if num_usable:
            inputs = {name: value.to(self.device) for name, value in prepared.inputs.items()}
            exact_MLH = self.lower(inputs).cpu()
            usable = [row for row, fault in enumerate(prepared.faults) if fault is None]
            tokens_MLH = rounded(exact_MLH, prepared.mask_ML, usable, self.tower)
        else:
            tokens_MLH = torch.empty(0, 1, self.hidden_size, dtype=self.dtype)
        lengths_M = torch.full((num_usable,), tokens_MLH.shape[1], dtype=torch.int32)
        if prepared.mask_ML is not None:
            lengths_M = prepared.mask_ML.sum(dim=1, dtype=torch.int32)
        return EncodedItems(prepared.faults, tokens_MLH, lengths_M, prepared.is_cut)
