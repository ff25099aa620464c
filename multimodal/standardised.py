"""A linear layer on standardised inputs: what an encoder must start from.

Outputs of pretrained towers all point the same way (two items of a catalogue have a cosine near 1),
so what tells items apart is small beside what they share: a contrastive loss sees no difference and
collapses, and a ranking loss learns it slowly. Subtracting each dimension's mean over the catalogue
and dividing by its deviation removes that.
"""

# Shapes: U items, H width of the fused tokens, D vector dim.

import torch
from torch import Tensor, nn

_MIN_DEVIATION = 1e-6


class StandardisedLinear(nn.Linear):
    """A linear layer on inputs of mean 0 and deviation 1, once their moments are known."""

    mean_H: Tensor
    deviation_H: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("mean_H", torch.zeros(in_features))
        self.register_buffer("deviation_H", torch.ones(in_features))

    @torch.no_grad()
    def standardise(self, moments_3H: Tensor) -> None:
        """Take mean and deviation from count, sum and sum of squares of every input (3, H)."""
        count_H, total_H, squares_H = moments_3H
        count_H = count_H.clamp(min=1)
        mean_H = total_H / count_H
        deviation_H = (squares_H / count_H - mean_H.square()).clamp(min=0).sqrt()
        self.mean_H.copy_(mean_H)
        # A constant dimension says nothing: it stays 0 instead of being blown up.
        self.deviation_H.copy_(torch.where(deviation_H > _MIN_DEVIATION, deviation_H, torch.inf))

    @torch.no_grad()
    def wake(self, mean_H: Tensor, deviation_H: Tensor) -> Tensor:
        """Take the given moments where a dimension was constant when its own were computed.

        Its inputs were 0 whatever they held, so what was learned of the others stays true.

        Returns:
            True where it did, (H,).
        """
        wakes_H = self.deviation_H.isinf() & deviation_H.isfinite()
        self.mean_H.copy_(torch.where(wakes_H, mean_H, self.mean_H))
        self.deviation_H.copy_(torch.where(wakes_H, deviation_H, self.deviation_H))
        return wakes_H

    def standardised(self, x_UH: Tensor) -> Tensor:
        """The inputs with mean 0 and deviation 1 over the catalogue."""
        return (x_UH - self.mean_H) / self.deviation_H

    def forward(self, x_UH: Tensor) -> Tensor:
        """(U, D)."""
        return super().forward(self.standardised(x_UH))
