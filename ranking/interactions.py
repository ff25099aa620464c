"""Explicit feature interactions: cross layers and the factorisation machine."""

# Shapes: B samples, F fields, D embedding dim, X any width, R rank of the cross weights.

import torch
from torch import Tensor, nn


class CrossNetwork(nn.Module):
    """Cross layers of DCN-v2 (arXiv 2008.13535): x_{l+1} = x_0 * (W x_l + b) + x_l.

    With a rank R, W = U V with V (R, X) and U (X, R).
    """

    def __init__(self, dim: int, num_layers: int, rank: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(dim, dim)
            if rank is None
            else nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim))
            for _ in range(num_layers)
        )

    def forward(self, x_BX: Tensor) -> Tensor:
        """Crossed features, (B, X)."""
        crossed_BX = x_BX
        for layer in self.layers:
            crossed_BX = torch.addcmul(crossed_BX, x_BX, layer(crossed_BX))
        return crossed_BX


def fm_second_order(fields_BFD: Tensor) -> Tensor:
    """Sum of the inner products of all pairs of fields (B, 1), in time linear in F.

    The identity of Rendle's factorisation machines: 2 sum_{a<b} <v_a, v_b> = |sum v|^2 - sum |v|^2.
    """
    square_of_sum_BD = fields_BFD.sum(dim=1).square()
    sum_of_squares_BD = fields_BFD.square().sum(dim=1)
    return 0.5 * (square_of_sum_BD - sum_of_squares_BD).sum(dim=1, keepdim=True)
