"""Lower-layer tokens of a step's unique items: what the content encoder reads.

Shapes: U unique items, L token positions, H width of a tower.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModalityTokens:
    """Tokens of one modality.

    item            tokens      mask       present
    both words      w1 w2       1 1        1
    one word        w1 -        1 0        1
    no text         -  -        0 0        0
    """

    tokens_ULH: Tensor
    """At least one position; values at masked positions are never read."""
    mask_UL: Tensor
    """True where there is a token."""

    @property
    def present(self) -> Tensor:
        """(U,) False for items that lack the modality."""
        return self.mask_UL.any(dim=1)

    def to(self, device: torch.device, non_blocking: bool = False) -> "ModalityTokens":
        """On another device."""
        return ModalityTokens(
            self.tokens_ULH.to(device, non_blocking=non_blocking),
            self.mask_UL.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of U items, by modality."""

    modalities: Mapping[str, ModalityTokens]

    @property
    def num_items(self) -> int:
        """U."""
        return next(iter(self.modalities.values())).mask_UL.shape[0]

    def to(self, device: torch.device, non_blocking: bool = False) -> "TokenBatch":
        """On another device."""
        return TokenBatch(
            {name: part.to(device, non_blocking) for name, part in self.modalities.items()}
        )

    def split(self, num_items: int) -> list["TokenBatch"]:
        """In pieces of at most so many items."""
        pieces = {
            name: zip(part.tokens_ULH.split(num_items), part.mask_UL.split(num_items), strict=True)
            for name, part in self.modalities.items()
        }
        return [
            TokenBatch({n: ModalityTokens(*part) for n, part in zip(pieces, parts, strict=True)})
            for parts in zip(*pieces.values(), strict=True)
        ]
