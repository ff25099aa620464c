"""Finite scalar quantization of a residual along its principal directions (Res-KmeansFSQ).

z = round((V - 1) * sigmoid(x W)) in every direction, and the code is the number with these digits.
How the method's authors train W is not published; here its columns are principal directions, scaled
so that the sigmoid is close to the distribution function of the projections.
"""

# Shapes: N vectors, D vector dim, P directions, V values per direction.

from dataclasses import dataclass

import torch
from torch import Tensor

from embedding.errors import UserError
from multimodal.codes.config import Fsq
from multimodal.codes.exact_lookup import exact_products, rounding
from multimodal.codes.kmeans import principal_directions

# sigmoid(1.702 t) is within 0.01 of the standard normal distribution function.
_NORMAL_SCALE = 1.702


@dataclass(frozen=True)
class FsqLevel:
    """A fitted level; code = sum over p of z_p V^p."""

    weights_DP: Tensor
    """Principal directions, each scaled by 1.702 over the deviation along it."""
    values_PV: Tensor
    """Mean projection onto the (unit) direction of the vectors with each value: what a value stands
    for when a code is decoded."""

    @property
    def num_codes(self) -> int:
        """Codes of the level."""
        return int(self.values_PV.shape[1] ** self.values_PV.shape[0])

    def encode(self, x_ND: Tensor) -> Tensor:
        """Codes (N,); where rounding could decide, the projection is taken exactly."""
        top = self.values_PV.shape[1] - 1
        projected_NP = x_ND @ self.weights_DP
        z_NP = top * torch.sigmoid(projected_NP)
        # The sigmoid's slope is at most 1/4; its own rounding is that of numbers up to `top`.
        longest = x_ND.norm(dim=1, keepdim=True) * self.weights_DP.norm(dim=0)
        error_NP = top * rounding(x_ND.shape[1]) * (longest / 4 + 1)
        unsure = ((z_NP - z_NP.floor() - 0.5).abs() <= error_NP).nonzero()
        if len(unsure):
            row_P, direction_P = unsure.unbind(1)
            exact_P = exact_products(x_ND, row_P, self.weights_DP.t(), direction_P)
            z_NP = z_NP.double()
            z_NP[row_P, direction_P] = top * torch.sigmoid(exact_P)
        return (torch.round(z_NP).long() * self._radix()).sum(1)

    def decode(self, codes_N: Tensor) -> Tensor:
        """The vector (N, D) that each code stands for."""
        z_NP = codes_N[:, None] // self._radix() % self.values_PV.shape[1]
        projections_NP = self.values_PV.gather(1, z_NP.T).T
        return projections_NP @ self._directions().T

    def nearest(self, x_ND: Tensor) -> Tensor:
        """The code (N,) whose vector lies nearest; the first one of equals.

        Directions are orthonormal, so each value is chosen by itself: no code is compared with all.
        """
        projected_NP1 = (x_ND @ self._directions()).unsqueeze(2)
        z_NP = (projected_NP1 - self.values_PV).abs().argmin(2)
        return (z_NP * self._radix()).sum(1)

    def to(self, device: torch.device) -> "FsqLevel":
        """On another device."""
        return FsqLevel(self.weights_DP.to(device), self.values_PV.to(device))

    def reordered(self, order_P: Tensor, flip_P: Tensor) -> "FsqLevel":
        """The same quantizer with directions in another order and some of them reversed."""
        values_PV = self.values_PV[order_P]
        values_PV = torch.where(flip_P[:, None], -values_PV.flip(1), values_PV)
        weights_DP = self.weights_DP[:, order_P]
        return FsqLevel(torch.where(flip_P, -weights_DP, weights_DP), values_PV)

    def _radix(self) -> Tensor:
        directions, values = self.values_PV.shape
        return values ** torch.arange(directions, device=self.values_PV.device)

    def _directions(self) -> Tensor:
        return self.weights_DP / self.weights_DP.norm(dim=0)


def fit_fsq(x_ND: Tensor, config: Fsq) -> FsqLevel:
    """Fit directions and values to residuals.

    Raises:
        UserError: the vectors have, or vary in, fewer directions than the config asks for.
    """
    if config.num_directions > x_ND.shape[1]:
        raise UserError(
            f"rq.fsq.num_directions={config.num_directions}, but the vectors have "
            f"{x_ND.shape[1]} dimensions; use at most that many"
        )
    directions_DP = principal_directions(x_ND)[:, : config.num_directions]
    projected_NP = x_ND @ directions_DP
    scale_P = projected_NP.std(0)
    usable = int((scale_P > 1e-6 * scale_P.max()).sum()) if scale_P.max() > 0 else 0
    if usable < config.num_directions:
        raise UserError(
            f"rq.fsq.num_directions={config.num_directions}, but what K-means left of the vectors "
            f"varies in {usable} directions only; use at most that many, or no fsq level"
        )
    top = config.values_per_direction - 1
    weights_DP = directions_DP * (_NORMAL_SCALE / scale_P)
    z_NP = torch.round(top * torch.sigmoid(x_ND @ weights_DP)).long()
    sums_PV = projected_NP.new_zeros(config.num_directions, top + 1)
    sums_PV.scatter_add_(1, z_NP.T, projected_NP.T)
    counts_PV = torch.zeros_like(sums_PV).scatter_add_(1, z_NP.T, torch.ones_like(projected_NP.T))
    return FsqLevel(weights_DP, sums_PV / counts_PV.clamp(min=1))
